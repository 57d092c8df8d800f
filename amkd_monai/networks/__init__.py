"""The student networks and the encoders they are built from."""

from amkd_monai.networks.shared_student import Head, SharedStudent, initialised, takes_part_of, with_heads_of
from amkd_monai.networks.student import ClassStudent, EncodedStudent, Student, create_encoder, load_encoder_weights

__all__ = [
    "ClassStudent",
    "EncodedStudent",
    "Head",
    "SharedStudent",
    "Student",
    "create_encoder",
    "initialised",
    "load_encoder_weights",
    "takes_part_of",
    "with_heads_of",
]
