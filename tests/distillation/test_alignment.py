import numpy as np
import pytest
import torch
from torch import nn

from amkd_monai.distillation.alignment import Alignment, ChannelNorm, Standardiser, pool_finer, to_grid


def features(size=(16, 24), seed=0):
    rng = torch.Generator().manual_seed(seed)
    h, w = size
    return {
        8: torch.randn((2, 6, h // 8, w // 8), generator=rng, requires_grad=True),
        16: torch.randn((2, 9, -(-h // 16), -(-w // 16)), generator=rng, requires_grad=True),
    }


def test_the_channel_norm_normalises_each_location():
    x = torch.randn(2, 5, 3, 4) * 7 + 2
    y = ChannelNorm(5)(x).detach()
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(2, 3, 4), atol=1e-3, rtol=0)


def test_maps_are_area_pooled_down_and_interpolated_up():
    x = torch.arange(32.0).view(1, 1, 4, 8)
    np.testing.assert_allclose(to_grid(x, (2, 4)).numpy()[0, 0], x.numpy().reshape(2, 2, 4, 2).mean((1, 3)))
    assert to_grid(x, (4, 8)) is x
    assert to_grid(x, (8, 16)).shape == (1, 1, 8, 16)
    assert to_grid(x, (8, 4)).shape == (1, 1, 8, 4)


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (5, 7)])
def test_both_levels_reach_the_teachers_grid(grid):
    maps = features()
    align = Alignment({8: 6, 16: 9}, out_channels=4, hidden=5)
    out = align(maps, grid)
    assert out.shape == (2, 4, *grid)
    out.square().mean().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps.values())
    assert all(p.grad is not None for p in align.parameters())


def test_finer_levels_are_pooled_before_and_coarser_ones_resized_after_they_are_projected():
    maps, align = features((32, 48)), Alignment({8: 6, 16: 9}, out_channels=4)  # 4 x 6 and 2 x 3 cells
    fine, coarse = align.levels["8"], align.levels["16"]
    between = fine(to_grid(maps[8], (3, 4))) + to_grid(coarse(maps[16]), (3, 4))
    torch.testing.assert_close(align(maps, (3, 4)), between)
    below = fine(to_grid(maps[8], (1, 2))) + coarse(to_grid(maps[16], (1, 2)))
    torch.testing.assert_close(align(maps, (1, 2)), below)


def test_levels_that_were_pooled_once_for_several_teachers_give_the_same():
    maps, align = features((32, 48)), Alignment({8: 6, 16: 9}, out_channels=4)
    pooled = {stride: pool_finer(level, (3, 4)) for stride, level in maps.items()}
    assert pooled[8].shape[-2:] == (3, 4) and pooled[16] is maps[16]
    assert torch.equal(align(pooled, (3, 4)), align(maps, (3, 4)))


def test_standardised_features_have_mean_zero_and_deviation_one():
    x = torch.randn(50, 3, 4, 5) * torch.tensor([0.1, 5, 1.0]).view(3, 1, 1) + 3
    standardise = Standardiser(x.mean((0, 2, 3)), x.std((0, 2, 3), unbiased=False))
    y = standardise(x.half())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)
    assert set(standardise.state_dict()) == {"mean", "std"} and not list(standardise.parameters())


def test_a_channel_that_never_changes_stays_finite():
    standardise = Standardiser(torch.tensor([2.0]), torch.tensor([0.0]))
    assert torch.equal(standardise(torch.full((1, 1, 2, 2), 2.0)), torch.zeros(1, 1, 2, 2))


def test_it_learns_to_imitate_a_projection():
    torch.manual_seed(0)
    maps = {s: m.detach() for s, m in features((64, 64)).items()}
    target = nn.Conv2d(6, 4, 1)(to_grid(maps[8], (4, 4))).detach()
    align = Alignment({8: 6, 16: 9}, out_channels=4, hidden=32)
    optimiser = torch.optim.Adam(align.parameters(), 1e-2)
    for _ in range(150):
        loss = (align(maps, (4, 4)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 * float(target.var())
