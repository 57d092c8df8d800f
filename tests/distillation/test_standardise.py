import math

import pytest
import torch
from toy_problem import generator

from amkd_monai.distillation.standardise import (
    MeanStdStandardiser,
    PhiSStandardiser,
    balancing_rotation,
    hadamard,
    make_standardiser,
)


def features(channels, n=400, seed=0):
    """Correlated channels of very different variance (n, C, 1, 1)."""
    rng = generator(seed)
    spread = torch.logspace(-2, 1, channels)
    x = torch.randn((n, channels), generator=rng) * spread
    return (x @ torch.linalg.qr(torch.randn((channels, channels), generator=rng))[0] + 3)[:, :, None, None]


def statistics(x):
    flat = x[:, :, 0, 0]
    return flat.mean(0), flat.std(0, unbiased=False), torch.cov(flat.T, correction=0).reshape(x.shape[1], x.shape[1])


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 272, 768])
def test_hadamard_matrices_are_orthogonal_signs(order):
    h = hadamard(order)
    assert h is not None and ((h == 1) | (h == -1)).all()
    torch.testing.assert_close(h @ h.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 36])
def test_orders_without_a_construction_are_told(order):
    assert hadamard(order) is None


@pytest.mark.parametrize("channels", [1, 3, 5, 7, 36])
def test_the_rotation_balances_any_variances(channels):
    variances = torch.rand(channels, generator=generator(channels)).double() ** 4
    q = balancing_rotation(variances)
    torch.testing.assert_close(q @ q.T, torch.eye(channels, dtype=torch.float64))
    balanced = (q @ torch.diag(variances) @ q.T).diagonal()
    torch.testing.assert_close(balanced, torch.full_like(balanced, float(variances.mean())), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("channels", [2, 3, 5, 8, 12])
def test_phi_s_gives_every_channel_variance_one_by_one_scalar(channels):
    x = features(channels)
    mean, std, covariance = statistics(x)
    standardise = PhiSStandardiser(mean, covariance)
    y = standardise(x)
    flat = y[:, :, 0, 0]
    torch.testing.assert_close(flat.mean(0), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.std(0, unbiased=False), torch.ones(channels), atol=1e-2, rtol=0)
    near = torch.cdist(flat[:20], flat[:20]) / torch.cdist(x[:20, :, 0, 0], x[:20, :, 0, 0]).clamp_min(1e-9)
    off = near[~torch.eye(20, dtype=torch.bool)]
    assert off.max() / off.min() < 1.01  # distances are those of the features but for one scalar
    scalar = float(1 / covariance.diagonal().mean().sqrt())
    assert math.isclose(float(off.mean()), scalar, rel_tol=1e-2)
    for made in (standardise, MeanStdStandardiser(mean, std)):
        measured = torch.cov(made(x)[:, :, 0, 0].T, correction=0).double().reshape(channels, channels)
        torch.testing.assert_close(
            made.covariance_after(covariance.reshape(channels, channels)), measured, atol=2e-2, rtol=2e-2
        )


def test_modes_are_chosen_by_name():
    mean, std, covariance = statistics(features(4))
    assert isinstance(make_standardiser("mean_std", mean, std), MeanStdStandardiser)
    assert isinstance(make_standardiser("phi_s", mean, std, covariance), PhiSStandardiser)
    for arguments, word in ((("oracle", mean, std), "oracle"), (("phi_s", mean, std), "covariance")):
        with pytest.raises(ValueError, match=word) as error:
            make_standardiser(*arguments)
        assert str(error.value).endswith(".")


def test_the_state_comes_back():
    mean, _, covariance = statistics(features(4))
    first = PhiSStandardiser(mean, covariance)
    second = PhiSStandardiser(torch.zeros(4), torch.eye(4))
    second.load_state_dict(first.state_dict())
    x = features(4, seed=1)
    assert torch.equal(first(x), second(x)) and not list(first.parameters())
