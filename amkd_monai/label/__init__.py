"""Students in a MONAI Label server: inference, active learning, fine-tuning from the labels that are saved there."""
