"""Trainers, evaluators and their handlers."""
