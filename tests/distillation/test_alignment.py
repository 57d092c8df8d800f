import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_problem import generator

from amkd_monai.distillation.distiller import Alignment, LearnedCode, Standardiser
from amkd_monai.distillation.losses import pool_finer, reconstruction_loss, to_grid


def features(size=(16, 24), seed=0):
    rng = torch.Generator().manual_seed(seed)
    h, w = size
    return {
        8: torch.randn((2, 6, h // 8, w // 8), generator=rng, requires_grad=True),
        16: torch.randn((2, 9, -(-h // 16), -(-w // 16)), generator=rng, requires_grad=True),
    }


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


def maps(channels=6, batch=3, size=(4, 5), seed=0):
    """Correlated features (B, C, h, w) of mean about 0."""
    mix = torch.randn((channels, channels), generator=generator(7)) / channels**0.5
    return torch.einsum("cd,bdhw->bchw", mix, torch.randn((batch, channels, *size), generator=generator(seed)))


def test_the_reconstruction_loss_equals_a_reference():
    a, b = maps(seed=1), maps(seed=2)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    cosine = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    expected = 0.5 * ((x - y) ** 2).mean(1) + 0.3 * np.abs(x - y).mean(1) + 0.2 * (1 - cosine)
    np.testing.assert_allclose(reconstruction_loss(a, b).numpy(), expected, rtol=1e-4)
    assert reconstruction_loss(a, a).abs().max() < 1e-6


def test_the_target_gets_no_gradient():
    code, target = LearnedCode(6, 3), maps().requires_grad_()
    assert not code.encode(target).requires_grad
    code.autoencoder_loss(target).sum().backward()
    assert target.grad is None
    restored, target = maps(seed=3).requires_grad_(), maps().requires_grad_()
    reconstruction_loss(restored, target).sum().backward()
    assert target.grad is None and restored.grad.abs().sum() > 0


def test_the_frozen_way_back_trains_the_student_alone():
    code, aligned = LearnedCode(6, 3), torch.randn(2, 3, 4, 5, requires_grad=True)
    torch.testing.assert_close(code.decode_frozen(aligned), code.decoder(aligned))
    reconstruction_loss(code.decode_frozen(aligned), maps(batch=2)).sum().backward()
    assert aligned.grad.abs().sum() > 0
    assert all(p.grad is None for p in code.parameters())
    code.autoencoder_loss(maps()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in code.parameters())


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 6)])
def test_the_autoencoder_learns_from_every_second_row_and_column(size):
    code, target = LearnedCode(6, 3), maps(size=size)
    cells = target[:, :, ::2, ::2]
    loss = code.autoencoder_loss(target)
    torch.testing.assert_close(loss, reconstruction_loss(code.decoder(code.encoder(cells)), cells))
    assert loss.shape == (3, -(-size[0] // 2), -(-size[1] // 2))


def test_a_learned_code_comes_to_hold_the_features():
    torch.manual_seed(0)
    code, target = LearnedCode(6, 6), maps(batch=8)
    optimiser = torch.optim.Adam(code.parameters(), 1e-2)
    first = float(code.autoencoder_loss(target).mean().detach())
    for _ in range(150):
        loss = code.autoencoder_loss(target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.3 * first
    every = reconstruction_loss(code.decode_frozen(code.encode(target)), target)  # cells it never learned from, too
    assert float(every.mean().detach()) < 0.4 * first
    assert code.encode(target).var() > 1e-3  # not collapsed


@settings(max_examples=20, deadline=None, database=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 9),
    code=st.integers(1, 12),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_size_goes_there_and_back(batch, channels, code, size, dtype):
    x = maps(channels, batch, size).to(dtype).float()
    built = LearnedCode(channels, code)
    restored = built.decode_frozen(built.encode(x))
    assert restored.shape == x.shape and torch.isfinite(restored).all()
    loss = reconstruction_loss(restored.to(dtype), x.to(dtype))
    assert loss.shape == (batch, *size) and loss.dtype == torch.float32 and torch.isfinite(loss).all()
