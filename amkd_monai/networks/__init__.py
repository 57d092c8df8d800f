"""The student networks and the encoders they are built from."""

from amkd_monai.networks.shared_student import Head, SharedStudent, initialised, takes_part_of, with_heads_of
from amkd_monai.networks.student import ClassStudent, Student

__all__ = ["ClassStudent", "Head", "SharedStudent", "Student", "initialised", "takes_part_of", "with_heads_of"]
