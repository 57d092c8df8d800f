"""Students in a MONAI Label server: inference, active learning, fine-tuning from saved labels."""
