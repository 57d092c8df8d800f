"""Frozen teachers: each owns its preprocessing and returns features, and logits if it has any."""
