"""Frozen teachers: each owns its preprocessing and returns features, and logits where it can answer by itself."""
