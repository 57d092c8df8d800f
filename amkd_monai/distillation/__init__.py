"""The distillation method: tensors in, named losses out. Knows nothing of teachers, files or engines."""

from amkd_monai.distillation.distiller import DistillationOutput, Distiller, TeacherSpec

__all__ = ["DistillationOutput", "Distiller", "TeacherSpec"]
