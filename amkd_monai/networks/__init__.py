"""The student network and the encoders it is built from."""

from amkd_monai.networks.encoder import create_encoder, load_encoder_weights
from amkd_monai.networks.student import Student

__all__ = ["Student", "create_encoder", "load_encoder_weights"]
