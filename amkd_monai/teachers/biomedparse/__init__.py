"""BiomedParse v1 (Zhao et al., Nature Methods 2025): a text-prompted segmentation network as a teacher."""
