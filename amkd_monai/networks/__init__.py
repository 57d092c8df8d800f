"""The student networks and the encoders they are built from."""

from amkd_monai.networks.encoder import create_encoder, load_encoder_weights
from amkd_monai.networks.shared_student import Head, SharedStudent
from amkd_monai.networks.student import ClassStudent, EncodedStudent, Student

__all__ = [
    "ClassStudent",
    "EncodedStudent",
    "Head",
    "SharedStudent",
    "Student",
    "create_encoder",
    "load_encoder_weights",
]
