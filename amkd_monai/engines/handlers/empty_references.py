"""Handler that counts apart the validation cases on which Dice is not defined."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from torch import Tensor


class EmptyReferences:
    """Report how often something is predicted where the reference is empty.

    The mean Dice of MONAI leaves cases with an empty reference out; without this their errors would be seen nowhere.
    ``engine.state.metrics`` gets ``val_false_positive_rate``, the share of these cases with a predicted foreground, and
    ``val_empty_references``, their number; nothing if there is no such case. Attach before handlers that log metrics.
    The output of the evaluator is a list of dicts with one-hot ``pred`` and ``label``, (C, ...), background first.
    """

    def __init__(self) -> None:
        self._predicted: list[bool] = []
        self._cases = 0

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self, engine: Engine) -> None:
        self._predicted, self._cases = [], 0

    def _collect(self, engine: Engine) -> None:
        for case in engine.state.output:
            self._cases += 1
            if not _has_foreground(case[CommonKeys.LABEL]):
                self._predicted.append(_has_foreground(case[CommonKeys.PRED]))

    def _report(self, engine: Engine) -> None:
        if self._cases and len(self._predicted) == self._cases:
            raise ValueError(
                f"All {self._cases} validation cases have an empty reference, so Dice cannot choose the best student: "
                "change the split, or check that the masks are read right (`python -m amkd_monai data check`)."
            )
        if self._predicted:
            engine.state.metrics["val_false_positive_rate"] = sum(self._predicted) / len(self._predicted)
            engine.state.metrics["val_empty_references"] = len(self._predicted)


def _has_foreground(one_hot: Tensor) -> bool:
    return bool((one_hot[1:] > 0).any())
