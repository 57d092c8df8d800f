"""A 3D student: any network of MONAI for volumes, trained and distilled through the slices of its patches."""

from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (8, 16)  # in-plane strides of the maps that distillation compares with teachers


class VolumeStudent(nn.Module):
    """A 3D network whose training is that of a student of slices.

    Outside training it takes volumes, so that ``SlidingWindowInferer`` runs it on patches of ``slices`` whole slices. A
    training batch holds such patches as their slices, one after another; logits and feature maps at :data:`STRIDES`
    are handed to distillation slice by slice. A feature map is the network's widest one before the next coarser one,
    averaged to its stride where the network has none of it, and repeated along the slices. The network goes on from
    that map, to the same values, so that gradients with respect to it are those of the answer.

    Args:
        network: makes the network (in a config, ``"_mode_": "callable"``): one input channel, ``num_classes`` outputs.
        slices: slices of a patch.
        num_classes: logit channels, background included.
        seed: of the initial values; the global random state is left alone.
    """

    __jit_ignored_attributes__ = ("_places",)

    def __init__(self, network: Callable[[], nn.Module], slices: int = 32, num_classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        if slices < 2:
            raise ValueError(f"The patches of a 3D student have {slices} slices: give at least 2.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = network()
        self.slices, self.num_classes = int(slices), num_classes
        self.strides = [1, *STRIDES]

    def forward(self, volume: Tensor) -> Tensor:
        """Return logits (B, num_classes, D, H, W) for volumes (B, channels, D, H, W) in [0, 1]; else a ValueError."""
        if not torch.jit.is_scripting():
            return self._checked(volume)
        return self.network(volume)

    def _checked(self, volume: Tensor) -> Tensor:
        logits = self.network(volume) if volume.ndim == 5 else None
        if not isinstance(logits, Tensor) or logits.shape != (volume.shape[0], self.num_classes, *volume.shape[2:]):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            needs = f"{self.num_classes} classes that returns (B, channels, D, H, W) at its size, no deep supervision"
            raise ValueError(f"A 3D student returns {tuple(volume.shape)} by {found}: use a network of {needs}.")
        return logits

    def encode(self, image: Tensor) -> list[Tensor]:
        """Return logits (N, num_classes, H, W) and maps (N, C, H / stride, W / stride) of slices (N, 3 channels, H, W).

        N is a multiple of ``slices``, else a ValueError; of a channel's three slices the middle one is the slice.
        """
        if image.ndim != 4 or len(image) % self.slices:
            raise ValueError(f"{len(image)} slices are no patches of {self.slices}: set recipe#slices to that.")
        volume = _stacked(image[:, 1::3], self.slices)
        maps: dict[int, Tensor] = {}
        hooks = [
            self.network.get_submodule(name).register_forward_hook(partial(self._tap, maps, volume.shape, stride))
            for stride, (name, _) in self._places.items()
        ]
        try:
            logits = self.forward(volume)
        finally:
            for hook in hooks:
                hook.remove()
        return [_sliced(logits), *(maps[stride] for stride in STRIDES)]

    def decode(self, levels: list[Tensor], size: list[int]) -> Tensor:
        """Return the logits (N, num_classes, H, W) among what ``encode`` gave; ``size`` plays no part."""
        return levels[0]

    def channels_at(self, stride: int) -> int:
        """Return the channels of the map at a stride (8 or 16)."""
        return self._places[stride][1]

    def _tap(
        self, maps: dict[int, Tensor], size: torch.Size, stride: int, module: nn.Module, given: Any, out: Tensor
    ) -> Tensor:
        """Keep the map of a module's output at a stride, and let the network go on from it."""
        shape = (size[2], max(1, size[3] // stride), max(1, size[4] // stride))
        maps[stride] = _at(out, shape)
        if torch.is_grad_enabled():
            out = _back(maps[stride], self.slices, out) + (out - _back(_at(out, shape), self.slices, out))
        return out

    @cached_property
    def _places(self) -> dict[int, tuple[str, int]]:
        """Name and channels of the module that gives the map at each stride, found by a run on an empty patch."""
        calls, taps, side = Counter[str](), list[tuple[str, int, int]](), 64

        def note(name: str, module: nn.Module, given: Any, out: Any) -> None:
            calls[name] += 1
            if isinstance(out, Tensor) and out.ndim == 5 and out.shape[3] <= side:
                taps.append((name, side // out.shape[3], out.shape[1]))

        hooks = [m.register_forward_hook(partial(note, n)) for n, m in self.network.named_modules() if n]
        was, channels = self.network.training, next(m.in_channels for m in self.modules() if isinstance(m, nn.Conv3d))
        try:
            with torch.no_grad():
                device = next(self.parameters()).device
                self.network.eval()(torch.zeros(1, channels, self.slices, side, side, device=device))
        finally:
            for hook in hooks:
                hook.remove()
            self.network.train(was)
        taps, places = [tap for tap in taps if calls[tap[0]] == 1], dict[int, tuple[str, int]]()
        for stride in STRIDES:
            level = max(s for _, s, _ in taps if s <= stride)
            coarser = next((i for i, (_, s, _) in enumerate(taps) if s > level), len(taps))
            name, _, channels = max((tap for tap in taps[coarser - 1 :: -1] if tap[1] == level), key=lambda tap: tap[2])
            places[stride] = name, channels
        return places


def _stacked(slices: Tensor, count: int) -> Tensor:
    """Volumes (B, C, D, H, W) of slices (B * D, C, H, W)."""
    return slices.unflatten(0, (-1, count)).transpose(1, 2)


def _sliced(volume: Tensor) -> Tensor:
    """Slices (B * D, C, H, W) of volumes (B, C, D, H, W)."""
    return volume.transpose(1, 2).flatten(0, 1)


def _at(out: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A map of the network as slices (B * D, C, h, w): averaged in the plane, repeated along the slices."""
    pooled = F.adaptive_avg_pool3d(out, (out.shape[2], *shape[1:]))
    return _sliced(F.interpolate(pooled, shape, mode="nearest"))


def _back(slices: Tensor, count: int, like: Tensor) -> Tensor:
    """Slices as a map of the network's own size."""
    pooled = F.adaptive_avg_pool3d(_stacked(slices, count), (like.shape[2], *slices.shape[-2:]))
    return F.interpolate(pooled, like.shape[2:], mode="nearest")
