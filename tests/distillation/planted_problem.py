"""Two kinds of images, and four teachers: an expert of each kind, one that always says the same, one that shouts."""

from dataclasses import dataclass

import torch
from toy_problem import generator, make_distiller

from amkd_monai.distillation import Batch, TeacherTarget

NAMES = ("expert_a", "expert_b", "constant", "noise")
GRID = (4, 4)
PRIOR_ENTROPY = 0.61
"""Of 30 % foreground."""


@dataclass
class Planted:
    """Images (n, 3, 32, 32), labels (n, 1, 32, 32), the kind of each image (n,) and {teacher: its targets}."""

    image: torch.Tensor
    label: torch.Tensor
    in_a: torch.Tensor
    teachers: dict


def planted(n, seed, noise=1.2):
    """Foreground shows in channel 0 of images of kind A and in channel 1 of kind B; channel 2 tells the kind."""
    rng = generator(seed)
    cells = (torch.rand((n, *GRID), generator=rng) < 0.3).float()
    distraction = (torch.rand((n, *GRID), generator=rng) < 0.3).float()
    in_a = torch.arange(n) % 2 == 0
    a = in_a[:, None, None]
    channels = [torch.where(a, cells, distraction), torch.where(a, distraction, cells), a.float().expand_as(cells)]
    image = torch.stack(channels, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    image = image + noise * torch.randn(image.shape, generator=rng)
    right = torch.stack([1.5 - 3 * cells, 3 * cells - 1.5], 1) + 0.3 * torch.randn((n, 2, *GRID), generator=rng)

    def shout():
        return 5 * torch.randn((n, 2, *GRID), generator=rng)

    a = a[:, None]
    logits = {
        "expert_a": torch.where(a, right, shout()),
        "expert_b": torch.where(a, shout(), right),
        "constant": torch.tensor([0.7, 0.3]).log().view(1, 2, 1, 1).expand(n, 2, *GRID).clone(),
        "noise": shout(),
    }
    mix = torch.randn((6, 2), generator=generator(99))
    teachers = {}
    for name, z in logits.items():
        maps = torch.einsum("cd,ndhw->nchw", mix, z / 3) + 0.1 * torch.randn((n, 6, *GRID), generator=rng)
        if name == "constant":
            maps = torch.full_like(maps, 0.5)
        teachers[name] = {"grid": maps, "logits": z}
    label = cells[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3).long()
    return Planted(image, label, in_a, teachers)


def batch_of(data, rows, known=None):
    teachers = {name: {kind: maps[rows] for kind, maps in t.items()} for name, t in data.teachers.items()}
    has_label = torch.ones(len(rows), dtype=torch.bool) if known is None else known[rows]
    return Batch(data.image[rows], data.label[rows], has_label, teachers)


def make(data, gate, distil=True, seed=0, **options):
    """A distiller for the planted problem, with fixed loss weights, so that only the teacher gate differs."""
    specs = []
    for name in NAMES if distil else ():
        maps = data.teachers[name]["grid"]
        mean, std = maps.mean((0, 2, 3)), maps.std((0, 2, 3))
        specs.append(TeacherTarget(name, (6, *GRID), mean, std, (2, *GRID), True, 1.0, 0.5))
    defaults = {"loss_gate": "fixed", "loss_strength": {"warmup": 0.0, "decay": 0.0, "end": 1.0}}
    return make_distiller(specs, seed, prior_entropy=PRIOR_ENTROPY, gate=gate, **{**defaults, **options})


def train(distiller, data, steps=150, seed=0, known=None):
    optimiser = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    rng = generator(seed)
    for _ in range(steps):
        rows = torch.randperm(len(data.image), generator=rng)[:12]
        total = distiller(batch_of(data, rows, known)).total
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        schedule.step()
    return distiller.eval()


def error_of(distiller, data):
    """Cross entropy of the student per pixel on new images, nats."""
    with torch.no_grad():
        logits = distiller.student(data.image)
    return float(torch.nn.functional.cross_entropy(logits, data.label[:, 0]))
