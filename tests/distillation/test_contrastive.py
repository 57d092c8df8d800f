import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problem import generator

from amkd_monai.distillation.contrastive import ContrastiveDistillation, SampleTable, contrastive_loss


def table(n=20, channels=7, seed=0, groups=None, classes=None, teachers=("a",)):
    vectors = {t: torch.randn((n, channels), generator=generator(seed + i)) for i, t in enumerate(teachers)}
    groups = torch.arange(n) if groups is None else torch.tensor(groups)
    return SampleTable(vectors, groups, None if classes is None else torch.tensor(classes))


def build(samples, **options):
    torch.manual_seed(0)
    return ContrastiveDistillation(5, samples, **options)


def student_maps(batch=3, seed=0, size=(2, 3)):
    return torch.randn((batch, 5, *size), generator=generator(seed), requires_grad=True)


def reference(student, vectors, index, negatives, tau):
    """Ten lines of numpy: student (B, C), vectors (n, C) standardised and normalised here, negatives per row."""
    t = (vectors - vectors.mean(0)) / vectors.std(0)
    t = t / np.linalg.norm(t, axis=1, keepdims=True)
    s = student / np.linalg.norm(student, axis=1, keepdims=True)
    losses = []
    for row, own in enumerate(index):
        positive = np.exp(s[row] @ t[own] / tau)
        others = sum(np.exp(s[row] @ t[j] / tau) for j in negatives[row])
        losses.append(-np.log(positive / (positive + others)))
    return np.array(losses)


def heads_of(module, features, name="a"):
    return module.heads[name](features.mean((2, 3))).detach().double().numpy()


@pytest.mark.parametrize("tau", [0.03, 0.07, 0.3])
def test_it_equals_the_numpy_reference(tau):
    samples = table(groups=[i // 2 for i in range(20)], teachers=("a", "b"))
    module, features, index = build(samples, temperature=tau), student_maps(), [0, 7, 12]
    negatives = [[j for j in range(20) if j // 2 != i // 2] for i in index]
    got = module(features, torch.tensor(index))
    for name, vectors in samples.vectors.items():
        expected = reference(heads_of(module, features, name), vectors.double().numpy(), index, negatives, tau)
        np.testing.assert_allclose(got[name].detach().numpy(), expected, rtol=2e-4)


def test_the_own_sample_its_group_and_its_class_are_never_negatives():
    groups, classes = [0, 0, 1, 1, 2, 3, 4, 5], [0, 1, 0, 1, 1, -1, 0, -1]
    module = build(table(8, groups=groups, classes=classes))
    index = torch.tensor([0, 3, 5])
    allowed = module.eligible(index)
    for row, i in enumerate(index.tolist()):
        for j in range(8):
            same = groups[i] == groups[j] or (classes[i] == classes[j] and classes[i] >= 0)
            assert bool(allowed[row, j]) == (not same), (i, j)
    module.negatives = 3
    for _ in range(20):
        keep, eligible = module._draw(allowed)
        assert keep.shape == (3, 3) and (eligible.sum(1) == torch.minimum(allowed.sum(1), torch.tensor(3))).all()
        assert all(len(set(row.tolist())) == 3 for row in keep)
        assert (allowed.gather(1, keep) == eligible).all()
        module.count_step()


@pytest.mark.parametrize("outside", [-1, 50])
def test_samples_outside_the_table_are_refused(outside):
    with pytest.raises(ValueError, match=rf"{outside}.* of 50"):
        build(table(50))(student_maps(), torch.tensor([1, outside, 3]))


def test_each_step_draws_other_negatives_and_a_resumed_run_the_same():
    first, maps, index = build(table(50), negatives=5), student_maps(), torch.tensor([1, 2, 3])
    losses = []
    for _ in range(4):
        losses.append(first(maps, index)["a"].detach())
        assert torch.equal(losses[-1], first(maps, index)["a"])  # looking changes nothing
        first.count_step()
        if len(losses) == 2:
            state = {k: v.clone() for k, v in first.state_dict().items()}
    assert not torch.equal(losses[0], losses[1])
    second = build(table(50), negatives=5)
    second.load_state_dict(state)
    for expected in losses[2:]:
        assert torch.equal(second(maps, index)["a"], expected)
        second.count_step()
    assert set(state) >= {"step", "log_temperature"} and not any("table" in k for k in state)


def test_the_student_learns_and_the_table_does_not():
    module, maps = build(table()), student_maps()
    module(maps, torch.tensor([0, 1, 2]))["a"].sum().backward()
    assert maps.grad.abs().sum() > 0 and module.log_temperature.grad.abs() > 0
    assert all(p.grad is not None for p in module.parameters())
    assert not module.table["a"].requires_grad and module.table["a"].grad is None


def test_it_is_near_zero_for_a_student_that_agrees():
    own, similar = torch.ones(3), torch.full((3, 9), -0.5)
    eligible = torch.ones(3, 9, dtype=torch.bool)
    assert contrastive_loss(similar, own, eligible, 0.07).max() < 1e-6
    assert contrastive_loss(-similar, -own, eligible, 0.07).min() > 10


def test_a_sample_without_negatives_costs_nothing():
    module, maps = build(table(4, groups=[0, 0, 0, 0])), student_maps(2)
    loss = module(maps, torch.tensor([0, 3]))["a"]
    assert torch.equal(loss, torch.zeros(2))
    loss.sum().backward()
    assert torch.isfinite(maps.grad).all()


def test_the_temperature_is_kept_in_its_range():
    module = build(table())
    for value, expected in ((1e-4, 0.03), (5.0, 0.3), (0.1, 0.1)):
        with torch.no_grad():
            module.log_temperature.fill_(math.log(value))
        assert float(module.temperature.detach()) == pytest.approx(expected)
    assert not build(table(), learnable=False).log_temperature.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_finite_at_the_coolest_temperature_under_autocast(dtype):
    module = build(table(), temperature=0.03)
    maps = (50 * student_maps()).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(maps, torch.tensor([0, 1, 2]))["a"]
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()


def test_a_temperature_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"contrastive#temperature is 0\.001"):
        build(table(20), temperature=0.001)


def test_missing_indices_and_vectors_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="index"):
        build(table())(student_maps(), None)
    broken = table()
    broken.vectors["a"][3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"'a'.*not finite"):
        build(broken)


@settings(max_examples=25, deadline=None, database=None)
@given(
    n=st.integers(2, 12),
    batch=st.integers(1, 5),
    negatives=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_any_batch_is_finite(n, batch, negatives, dtype, size, seed):
    rng = np.random.default_rng(seed)
    samples = table(n, groups=rng.integers(0, 3, n).tolist(), classes=rng.integers(-1, 2, n).tolist())
    module = build(samples, negatives=negatives)
    for _ in range(2):
        maps = student_maps(batch, seed, size).detach().to(dtype).requires_grad_()
        index = torch.from_numpy(rng.integers(0, n, batch))
        loss = module(maps, index)["a"]
        module.count_step()
        assert loss.shape == (batch,) and torch.isfinite(loss).all() and (loss >= 0).all()
        loss.sum().backward()
        assert torch.isfinite(maps.grad).all()
