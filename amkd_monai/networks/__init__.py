"""The student networks and the encoders they are built from."""

from amkd_monai.networks.shared_student import Head, SharedStudent, initialised, takes_part_of, with_heads_of
from amkd_monai.networks.student import ClassStudent, FindingStudent, Student
from amkd_monai.networks.volume_student import VolumeStudent

__all__ = [
    "ClassStudent",
    "FindingStudent",
    "Head",
    "SharedStudent",
    "Student",
    "VolumeStudent",
    "initialised",
    "takes_part_of",
    "with_heads_of",
]
