# ruff: noqa: F401
"""The student networks and the encoders they are built from."""

from amkd_monai.networks.student import (
    ClassStudent,
    FindingStudent,
    Head,
    SharedStudent,
    Student,
    initialised,
    takes_part_of,
    with_heads_of,
)
from amkd_monai.networks.volume_student import VolumeStudent
