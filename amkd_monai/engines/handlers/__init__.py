# ruff: noqa: F401
"""Ignite handlers: what happens besides the training and evaluation loops."""

from amkd_monai.engines.handlers.checkpoints import (
    Attach,
    AveragedStudent,
    EarlyStopping,
    KeptStudent,
    LoadStudent,
    ResumeCheckpoint,
)
from amkd_monai.engines.handlers.pictures import CasePreviews, TeacherPictures
from amkd_monai.engines.handlers.reports import (
    CalibrateMasks,
    CaseReport,
    ClassPredictions,
    ClassScore,
    EmptyReferences,
    FitTemperature,
    TrackEvaluation,
    WriteReport,
)
from amkd_monai.engines.handlers.run_record import RunRecord
