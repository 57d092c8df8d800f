"""Stop when validation no longer improves."""

from __future__ import annotations

import logging

from ignite.engine import Engine, Events

logger = logging.getLogger("amkd_monai")


class EarlyStopping:
    """End the training when the evaluator's best epoch lies more than ``patience`` epochs back.

    The state is the evaluator's, which is saved and resumed with the run. Attach to the trainer.

    Args:
        evaluator: its ``best_metric_epoch`` decides.
        patience: epochs without a new best.
    """

    def __init__(self, evaluator: Engine, patience: int) -> None:
        self.evaluator, self.patience = evaluator, patience

    def attach(self, engine: Engine) -> None:
        """Check at the end of every epoch."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Terminate the trainer if it is time."""
        best = self.evaluator.state.best_metric_epoch
        if best > 0 and engine.state.epoch - best >= self.patience:
            logger.info("no better validation since epoch %d: stopped after epoch %d", best, engine.state.epoch)
            engine.terminate()


class Attach:
    """Attach a handler that is defined elsewhere in a config, so that a list of handlers stays a literal list.

    Args:
        handler: object with ``attach(engine)``.
    """

    def __init__(self, handler: object) -> None:
        self.handler = handler

    def attach(self, engine: Engine) -> None:
        """Attach it."""
        self.handler.attach(engine)  # type: ignore[attr-defined]
