import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problem import generator

from amkd_monai.distillation.alignment import LearnedCode
from amkd_monai.distillation.losses import reconstruction_loss


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
