"""Ignite handlers: what happens beside the training and evaluation loops."""

from amkd_monai.engines.handlers.case_report import CaseReport
from amkd_monai.engines.handlers.checkpoints import BestStudent, LoadStudent, ResumeCheckpoint
from amkd_monai.engines.handlers.class_report import ClassPredictions, ClassReport, ClassScore, FitTemperature
from amkd_monai.engines.handlers.early_stopping import Attach, EarlyStopping
from amkd_monai.engines.handlers.empty_references import EmptyReferences
from amkd_monai.engines.handlers.mlflow_evaluation import TrackEvaluation
from amkd_monai.engines.handlers.multitask import TeachingMap, TransferReport
from amkd_monai.engines.handlers.pooled_features import PooledFeatures
from amkd_monai.engines.handlers.previews import CasePreviews
from amkd_monai.engines.handlers.report import WriteReport
from amkd_monai.engines.handlers.run_record import RunRecord
from amkd_monai.engines.handlers.teacher_pictures import TeacherPictures

__all__ = [
    "Attach",
    "BestStudent",
    "CasePreviews",
    "CaseReport",
    "ClassPredictions",
    "ClassReport",
    "ClassScore",
    "EarlyStopping",
    "EmptyReferences",
    "FitTemperature",
    "LoadStudent",
    "PooledFeatures",
    "ResumeCheckpoint",
    "RunRecord",
    "TeacherPictures",
    "TeachingMap",
    "TrackEvaluation",
    "TransferReport",
    "WriteReport",
]
