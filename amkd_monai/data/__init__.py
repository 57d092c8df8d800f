"""Data sets: official layouts, splits, phantoms, decoding, sampling and augmentation."""
