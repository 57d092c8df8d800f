"""Bundles: the parts that their configs are made of, and a new one for data of one's own."""
