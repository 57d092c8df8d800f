"""Handler that makes the report when an evaluation ends."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)


class WriteReport:
    """Write ``report.html`` beside the results of an evaluation. Attach it after the case report.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Register the handler."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            if dist.get_rank() != 0:
                return
        from amkd_monai.report.page import write_report

        logger.info("report: %s", write_report([self.output_dir], self.output_dir / "report.html"))
