"""The distillation method: tensors in, named losses out. Knows nothing of teachers, files or engines."""

from amkd_monai.distillation.contrastive import SampleTable
from amkd_monai.distillation.distiller import DistillationConfig, Distiller
from amkd_monai.distillation.interface import Batch, DistillationOutput, TeacherTarget

__all__ = ["Batch", "DistillationConfig", "DistillationOutput", "Distiller", "SampleTable", "TeacherTarget"]
