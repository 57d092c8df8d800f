"""The trainer: a MONAI SupervisedTrainer whose loss is the distiller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
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
from amkd_monai.distillation.deferred import INTERVAL, Faults
from amkd_monai.distillation.distiller import Batch, DistillationOutput, Distiller
from amkd_monai.engines.targets import TeacherTargets


class DistillationTrainer(SupervisedTrainer):
    """Train a student through a :class:`~amkd_monai.distillation.Distiller`.

    All randomness of an epoch depends on seed and epoch alone, so a resumed run repeats an uninterrupted one.
    ``state.output`` holds image, label and pred of the labelled rows and the total ``loss``; ``state.distillation``
    the last :class:`~amkd_monai.distillation.DistillationOutput`. Parameters that are not listed are MONAI's.

    Args:
        train_data_loader: loader over a :class:`BatchSampler`.
        network: the distiller, or DistributedDataParallel around it.
        targets: teachers' targets by sample index; None for plain supervised training.
        augmentation: random changes of a batch. With several stored views these are the geometric changes, and only
            the photometric ones of the augmentation are made.
        warped_features: what warping may make of cached feature maps: ``exact``, ``approximate`` or ``invalid``
            (:meth:`~amkd_monai.data.augment.Augmentation.check_features`).
        seed: seed of the run.
        amp: bfloat16 autocast of the student's forward (GPU).

    Raises:
        ValueError: the augmentation makes less of cached features than ``warped_features`` accepts, or in training a
            loss is not finite.
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
        warped_features: str = "approximate",
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
        if self.targets is not None and self.targets.has_features and self.targets.views == 1:
            self.augmentation.check_features(warped_features)
        self.seed = seed
        self.generator = torch.Generator()
        self.faults = Faults()
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
        if idist.get_rank() > 0:
            self.logger.setLevel("WARNING")
        self.add_event_handler(Events.EPOCH_STARTED, type(self)._start_epoch)

    def _start_epoch(self) -> None:
        sampler = self.data_loader.batch_sampler
        if isinstance(sampler, BatchSampler):
            sampler.set_epoch(self.state.epoch)
        self._seed_epoch(sampler.rank if isinstance(sampler, BatchSampler) else 0)

    def _seed_epoch(self, rank: int) -> None:
        """Make all that is random in this epoch follow from the seed, the epoch and the process."""
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
        return distillation_batch(data, self.targets, self.augmentation, self.generator, self.state.device)

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict[str, Tensor]:
        batch = self.prepare_distillation_batch(batchdata)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.image.device.type, dtype=torch.bfloat16, enabled=self.amp):
            result: DistillationOutput = self.network(batch, progress=self.progress)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        self._check(result)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        result.total.backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.optimizer.step()
        self.state.distillation = result
        engine.state.output = {
            Keys.IMAGE: batch.labelled(batch.image),
            Keys.LABEL: batch.labelled(batch.label),
            Keys.PRED: batch.labelled(result.logits).detach(),
            Keys.LOSS: result.total.detach(),
        }
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _check(self, result: DistillationOutput, of: str = "") -> None:
        """Note a loss that is not finite; refuse it once in an interval, and before anything is kept."""
        fault = ~torch.isfinite(result.total.detach())
        step = torch.full_like(fault, self.state.iteration, dtype=torch.long)
        remedy = "lower the learning rate; the checkpoints of earlier epochs are kept."
        self.faults.note(f"The loss{of} is not finite in step {{}}: {remedy}", fault, step)
        if self.state.iteration % INTERVAL == 0 or self.state.iteration % (self.state.epoch_length or 1) == 0:
            for module in self.network.modules():
                if isinstance(module, Distiller):
                    module.faults.read()
            self.faults.read()


def distillation_batch(
    data: dict[str, Any],
    targets: TeacherTargets | None,
    augmentation: Augmentation,
    generator: torch.Generator,
    device: torch.device,
    task: int = 0,
) -> Batch:
    """Bring a loader's batch to the device, read the teachers' targets and augment all alike.

    ``data`` holds samples of a :class:`~amkd_monai.data.decoded.DecodedDataset`, ``task`` numbers the data set.
    """
    image = data["image"].to(device).float() / 255
    label = data["label"].to(device)
    indices, size = data["index"].tolist(), (image.shape[-2], image.shape[-1])
    views: list[int] | None = None
    if targets is not None and targets.views > 1:  # the student is shown what is stored
        views = torch.randint(targets.views, (len(image),), generator=generator).tolist()
        theta = targets.view_matrices(indices, views).to(device)
    else:
        theta = augmentation.sample(len(image), size, generator).to(device)
    teachers = targets.read(indices, device, theta, views) if targets is not None else {}
    image = augmentation.photometric(warp(image, theta), generator)
    label = label.long() if label.ndim == 1 else warp(label.float(), theta, mode="nearest").round().long()
    image = image.contiguous(memory_format=torch.channels_last)
    return Batch(image, label, data["has_label"], teachers, data["index"].to(device), task=task)
