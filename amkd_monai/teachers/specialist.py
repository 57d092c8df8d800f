"""A specialist teacher: any trained network in a TorchScript or torch.export file."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amkd_monai.teachers.base import Teacher, TeacherFeatures, binary_to_two_class, pool_to_grid
from amkd_monai.weight_files import is_file
from amkd_monai.weights import DAMAGE_ERRORS, CheckpointError, file_sha256


def load_network_file(path: str | Path) -> nn.Module:
    """Load a network from a ``.ts`` (TorchScript) or ``.pt2`` (torch.export) file; neither holds Python code.

    A CheckpointError if it is not there or damaged.
    """
    path = Path(path)
    if not is_file(path):
        raise CheckpointError(f"There is no network file at {path}: give the path of a .ts or .pt2 file.")
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated; .pt2 is accepted too
            return torch.jit.load(path, map_location="cpu")
    except DAMAGE_ERRORS as error:
        raise CheckpointError(f"{path} is not a complete TorchScript or torch.export file: export it again.") from error


class SpecialistTeacher(Teacher):
    """A network file whose forward gives logits, or (logits, feature map).

    Its logits count as an outside answer: use it only where its training images are not those of the run (a network
    trained on the run's own images must be cross-fitted, see ``amkd_monai.engines.crossfit``).

    Args:
        path: ``.ts`` or ``.pt2`` file taking (B, 3, S, S), RGB in [0, 1].
        answers: ``masks`` for logits (B, classes, h, w), ``classes`` for logits (B, classes), one answer per image.
    """

    settings = ("image_size", "mean", "std", "grid_limit")

    def __init__(
        self,
        name: str,
        path: str | Path,
        image_size: int | tuple[int, int] | None = None,
        grid_limit: int = 16,
        licence: str = "unknown",
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        answers: str = "masks",
    ) -> None:
        super().__init__(name, licence)
        self.network, self.file_hash = load_network_file(path), file_sha256(path)
        self.came_from(path)
        self.answers, self.grid_limit = self.one_of("answers", answers, ("masks", "classes")), grid_limit
        self.set_input(image_size, mean, std)
        self.requires_grad_(False)
        if not str(path).endswith(".pt2"):  # an exported program has its mode fixed
            self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Keep evaluation mode; an exported program has no mode to change."""
        self.training = False
        if isinstance(self.network, torch.jit.ScriptModule):
            self.network.eval()
        return self

    def preprocessing(self) -> dict[str, Any]:
        """Return the file's digest, size, statistics and, unless it is masks, what it answers."""
        answers = {} if self.answers == "masks" else {"answers": self.answers}
        return {"file": self.file_hash, **super().preprocessing(), **answers}

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return logits (B, classes, h, w), h = w = 1 for classes of images, and the feature map if there is one.

        Other shapes of the network are a ValueError.
        """
        output = self.network(self.prepare(image))
        logits, grid = output if isinstance(output, (tuple, list)) else (output, None)
        of_images = self.answers == "classes"
        if logits.ndim != (2 if of_images else 4):
            given, wanted = tuple(logits.shape), "(B, classes)" if of_images else "(B, classes, h, w)"
            raise ValueError(f"The specialist '{self.name}' gave logits of shape {given}, not {wanted}: see `answers`.")
        logits = logits[:, :, None, None] if of_images else logits  # (B, classes) -> a map of one cell
        logits = binary_to_two_class(logits) if logits.shape[1] == 1 else logits
        if grid is None:
            return TeacherFeatures(logits=logits)
        return TeacherFeatures(grid=pool_to_grid(grid, self.grid_limit), pooled=grid.mean((2, 3)), logits=logits)
