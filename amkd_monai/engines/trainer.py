"""The trainer: a MONAI SupervisedTrainer whose loss is the distiller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amkd_monai.data.augment import Augmentation, warp
from amkd_monai.data.sampling import BatchSampler
from amkd_monai.distillation.distiller import Batch, DistillationOutput
from amkd_monai.engines.targets import TeacherTargets


class DistillationTrainer(SupervisedTrainer):
    """Train a student through a :class:`~amkd_monai.distillation.Distiller`.

    What is random in an epoch depends on seed and epoch alone, so a resumed run repeats an uninterrupted one.
    ``state.output`` holds image, label and pred of the labelled rows, the total ``loss`` and every loss by name;
    ``state.distillation`` holds the last :class:`~amkd_monai.distillation.DistillationOutput`.

    Args:
        device: where to train.
        max_epochs: length of the run; the progress that drives schedules is measured against it.
        train_data_loader: loader over a :class:`BatchSampler`.
        network: the distiller, or DistributedDataParallel around it.
        optimizer: over the distiller's parameters.
        targets: teachers' targets by sample index; None for plain supervised training.
        augmentation: random changes of a batch.
        seed: seed of the run.
        amp: bfloat16 autocast of the student's forward (GPU).
        inferer: as in MONAI's trainer, like all that follow.
        postprocessing: of predictions and labels.
        key_train_metric: the metric to watch.
        additional_metrics: further metrics.
        train_handlers: what happens beside the loop.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        targets: TeacherTargets | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        amp: bool = False,
        inferer: Inferer | None = None,
        postprocessing: Transform | None = None,
        key_train_metric: dict | None = None,
        additional_metrics: dict | None = None,
        train_handlers: Sequence | None = None,
    ) -> None:
        self.targets = targets if targets is not None and len(targets) else None
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self.generator = torch.Generator()
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=nn.Identity(),  # the distiller computes the loss
            inferer=inferer,
            postprocessing=postprocessing,
            key_train_metric=key_train_metric,
            additional_metrics=additional_metrics,
            train_handlers=train_handlers,
            amp=amp,
            decollate=postprocessing is not None,
            optim_set_to_none=True,
        )
        self.state.distillation = None
        self.add_event_handler(Events.EPOCH_STARTED, DistillationTrainer._start_epoch)

    def _start_epoch(self) -> None:
        sampler = self.data_loader.batch_sampler
        rank = sampler.rank if isinstance(sampler, BatchSampler) else 0
        if isinstance(sampler, BatchSampler):
            sampler.set_epoch(self.state.epoch)
        seed = (self.seed * 1_000_003 + self.state.epoch) * 1_009 + rank
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)

    @property
    def progress(self) -> float:
        """Part of the run that is done, in [0, 1]."""
        total = self.state.max_epochs * (self.state.epoch_length or 1)
        return min(1.0, (self.state.iteration - 1) / max(1, total))

    def prepare_distillation_batch(self, data: dict[str, Any]) -> Batch:
        """Bring a loader's batch to the device, read the teachers' targets and augment all alike."""
        device = self.state.device
        image = data["image"].to(device).float() / 255
        label = data["label"].to(device)
        teachers = self.targets.read(data["index"].tolist(), device) if self.targets is not None else {}
        size = (image.shape[-2], image.shape[-1])
        theta = self.augmentation.sample(len(image), size, self.generator).to(device)
        image = self.augmentation.photometric(warp(image, theta), self.generator)
        label = label.long() if label.ndim == 1 else warp(label.float(), theta, mode="nearest").round().long()
        warped = {name: {kind: warp(m, theta) for kind, m in maps.items()} for name, maps in teachers.items()}
        image = image.contiguous(memory_format=torch.channels_last)
        return Batch(image, label, data["has_label"].to(device), warped, data["index"].to(device))

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict[str, Tensor]:
        batch = self.prepare_distillation_batch(batchdata)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.image.device.type, dtype=torch.bfloat16, enabled=self.amp):
            result: DistillationOutput = self.network(batch, progress=self.progress)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        if not bool(torch.isfinite(result.total)):
            bad = [name for name, loss in result.losses.items() if not bool(torch.isfinite(loss).all())]
            raise FloatingPointError(
                f"The loss is not finite in epoch {self.state.epoch}, step {self.state.iteration} ({', '.join(bad)}): "
                "lower the learning rate; the checkpoints of earlier epochs are kept."
            )
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        result.total.backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.optimizer.step()
        rows = batch.has_label
        self.state.distillation = result
        engine.state.output = {
            Keys.IMAGE: batch.image[rows],
            Keys.LABEL: batch.label[rows],
            Keys.PRED: result.logits[rows].detach(),
            Keys.LOSS: result.total.detach(),
        }
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output
