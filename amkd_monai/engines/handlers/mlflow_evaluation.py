"""Handler that brings the result of an evaluation into MLflow."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler


class TrackEvaluation(MLFlowHandler):
    """MONAI's handler for an evaluation whose metrics are there when it ends, as the case report's are.

    Attach it after the handlers that write what ``artifacts`` names. Options are those of MONAI's handler.
    """

    def attach(self, engine: Engine) -> None:
        """Register the handler; metrics are logged before MONAI's own handlers close the run."""
        engine.add_event_handler(Events.COMPLETED, self.epoch_completed)
        super().attach(engine)
