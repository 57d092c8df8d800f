"""A tiny student, teachers with known answers, and batches of squares on noise."""

import torch
import torch.nn.functional as F
from torch import nn

from amkd_monai.distillation import Batch, DistillationConfig, Distiller, TeacherTarget, baselines, gates

CLASSES = 2
GATES = (*gates.GATES, *baselines.GATES)
LOSS_GATES = (*gates.LOSS_GATES, *baselines.LOSS_GATES)


class FirstTeacherGate(gates.TeacherGate):
    """A gate of a user's own: a share for the first teacher, the rest for nobody."""

    def __init__(self, setup, share=1.0):
        super().__init__(setup)
        self.share = share

    def weights(self, reading, available):
        first = torch.zeros_like(reading.errors)
        first[:, 0] = self.share * available[0]
        return first


class ToyStudent(nn.Module):
    """Three strided convolutions; levels at strides 4, 8 and 16."""

    strides = (4, 8, 16)
    channels = (6, 8, 10)

    def __init__(self, seed=0, classes=CLASSES):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a = nn.Conv2d(3, 6, 5, stride=4, padding=2)
            self.b = nn.Conv2d(6, 8, 3, stride=2, padding=1)
            self.c = nn.Conv2d(8, 10, 3, stride=2, padding=1)
            self.head = nn.Conv2d(6, classes, 1)

    def channels_at(self, stride):
        return self.channels[self.strides.index(stride)]

    def encode(self, image):
        a = F.gelu(self.a(image))
        b = F.gelu(self.b(a))
        return [a, b, F.gelu(self.c(b))]

    def decode(self, levels, size):
        coarse = F.interpolate(levels[2].mean(1, keepdim=True), size=levels[0].shape[-2:], mode="nearest")
        return F.interpolate(self.head(levels[0] + coarse), size=size, mode="bilinear")

    def forward(self, image):
        return self.decode(self.encode(image), list(image.shape[-2:]))


def spec(name="t", grid=(12, 4, 4), logits=(CLASSES, 8, 8), admitted=True, mean_error=0.3, score=0.7):
    channels = grid[0] if grid else 0
    return TeacherTarget(
        name,
        grid,
        torch.full((channels,), 0.5) if grid else None,
        torch.full((channels,), 2.0) if grid else None,
        logits,
        admitted and logits is not None,
        mean_error if logits else None,
        score if logits else None,
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


def squares(batch=2, size=(64, 64), seed=0):
    """Labels (B, 1, H, W) with one square each, at random places."""
    label = torch.zeros((batch, 1, *size), dtype=torch.long)
    for row in label[:, 0]:
        top, left = (int(torch.randint(0, n // 2, (1,), generator=generator(seed + len(row)))) for n in size)
        row[top : top + size[0] // 2, left : left + size[1] // 2] = 1
        seed += 1
    return label


def make_batch(specs, batch=2, size=(64, 64), seed=0, label=None, has_label=None, dtype=torch.float32):
    label = squares(batch, size, seed) if label is None else label
    image = (torch.rand((batch, 3, *size), generator=generator(seed)) * 0.5 + 0.5 * label.clamp(0, 1)).clamp(0, 1)
    teachers = {}
    for k, s in enumerate(specs):
        maps = {}
        if s.grid:
            maps["grid"] = torch.randn((batch, *s.grid), generator=generator(seed + 10 + k)).to(dtype)
        if s.logits:
            maps["logits"] = (2 * torch.randn((batch, *s.logits), generator=generator(seed + 50 + k))).to(dtype)
        teachers[s.name] = maps
    known = torch.ones(batch, dtype=torch.bool) if has_label is None else torch.tensor(has_label)
    return Batch(image, label, known, teachers)


def make_distiller(specs, seed=0, samples=None, student=None, prior_entropy=0.69, **settings):
    """A distiller; ``settings`` are those of its config."""
    torch.manual_seed(seed)
    config = DistillationConfig(**settings)
    student = student or ToyStudent(seed)
    return Distiller(student, specs, prior_entropy, config, samples)


def student_gradient(distiller):
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in distiller.student.parameters()]
    )
