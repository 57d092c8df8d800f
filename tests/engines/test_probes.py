import numpy as np
import pytest
import torch
from cache.toy_dataset import CountingTeacher, decoded, write_items

from amkd_monai.cache.build import cache_teacher
from amkd_monai.cache.store import ArraySpec, FeatureStore
from amkd_monai.engines import probes


def store_of(grid, folder):
    """A feature store of given maps (N, C, h, w)."""
    ids = [f"s{i}" for i in range(len(grid))]
    arrays = {"grid": ArraySpec(grid.shape[1:], "float32")}
    store = FeatureStore.create_or_open(folder, {"of": "test"}, ids, ids, arrays, shard_size=16)
    with store.building():
        for view, shard in store.missing():
            store.write_shard(view, shard, {"grid": grid[np.asarray(store.samples_of(shard))]})
    return store


class Labels:
    """What probes need of a dataset: label maps (N, H, W), groups, and which samples are labelled."""

    num_classes, classes, findings = 2, None, 0

    def __init__(self, labels, groups=None, has_label=None):
        self.labels = np.asarray(labels, np.uint8)[:, None]
        self.groups = groups or [f"g{i}" for i in range(len(labels))]
        self.has_label = np.ones(len(labels), bool) if has_label is None else has_label

    def __len__(self):
        return len(self.labels)


def cells(labels, size=8):
    """Label maps whose value is constant per sample."""
    return np.broadcast_to(np.asarray(labels)[:, None, None], (len(labels), size, size))


def accuracy(logits, labels):
    return float((logits.argmax(1) == np.asarray(labels)[:, None, None]).mean())


def plain(channels):
    return torch.zeros(channels), torch.ones(channels)


def test_out_of_fold_answers_to_random_labels_are_chance(tmp_path):
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(40, 60, 2, 2)).astype(np.float32).mean((2, 3), keepdims=True).repeat(2, 2).repeat(2, 3) * 2
    labels = rng.permutation(np.arange(40) % 2)
    store, dataset = store_of(grid, tmp_path / "s"), Labels(cells(labels))
    out_of_fold, fitted = probes.cross_fit_probes(store, dataset, *plain(60))
    assert out_of_fold.shape == (40, 2, 2, 2) and out_of_fold.dtype == np.float32 and len(fitted) == 5
    features = torch.from_numpy(grid)
    targets = probes.cell_targets(dataset, np.arange(40), 2, (2, 2))
    in_sample = probes.fit_probe(features, targets)(features).numpy()
    assert accuracy(in_sample, labels) > 0.95  # what an honest answer must not look like
    assert 0.25 < accuracy(out_of_fold, labels) < 0.75


def test_a_group_is_never_in_its_own_fit(tmp_path):
    """A channel tells the group, and members of a group share a label: only a leak could answer."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(20), 3)
    label_of_group = rng.permutation(np.arange(20) % 2)
    labels = label_of_group[group]
    grid = (4 * np.eye(20, dtype=np.float32)[group])[:, :, None, None] * np.ones((1, 1, 2, 2), np.float32)
    dataset = Labels(cells(labels), groups=[f"g{g}" for g in group])
    store = store_of(grid, tmp_path / "s")
    honest, _ = probes.cross_fit_probes(store, dataset, *plain(20))
    leaking, _ = probes.cross_fit_probes(store, Labels(cells(labels)), *plain(20))
    assert accuracy(leaking, labels) > 0.9
    assert accuracy(honest, labels) < 0.7


def test_each_answer_is_that_of_the_probe_of_the_other_folds(tmp_path):
    rng = np.random.default_rng(2)
    grid = rng.normal(size=(20, 3, 2, 2)).astype(np.float32)
    labels = (grid[:, :1] + 0.3 * rng.normal(size=(20, 1, 2, 2)) > 0)[:, 0].repeat(4, 1).repeat(4, 2)
    answers, fitted = probes.cross_fit_probes(store_of(grid, tmp_path / "s"), Labels(labels), *plain(3))
    candidates = np.stack([p(torch.from_numpy(grid)).numpy() for p in fitted])
    distance = np.abs(candidates - answers).max((2, 3, 4))  # (folds, N)
    assert (distance.min(0) < 1e-5).all() and np.bincount(distance.argmin(0)).tolist() == [4] * 5
    assert ((answers.argmax(1) == labels[:, ::4, ::4]).mean()) > 0.75


def test_folds_depend_on_the_seed_alone(tmp_path):
    rng = np.random.default_rng(3)
    store = store_of(rng.normal(size=(20, 3, 2, 2)).astype(np.float32), tmp_path / "s")
    dataset = Labels(cells(np.arange(20) % 2))
    one, again, other = (probes.cross_fit_probes(store, dataset, *plain(3), seed=s)[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_unlabelled_samples_are_answered_by_the_mean_of_all_probes(tmp_path):
    rng = np.random.default_rng(4)
    grid = rng.normal(size=(24, 3, 2, 2)).astype(np.float32)
    labels, known = cells(np.arange(24) % 2).copy(), np.arange(24) % 3 != 0
    labels[~known] = 255
    store = store_of(grid, tmp_path / "s")
    answers, fitted = probes.cross_fit_probes(store, Labels(labels, has_label=known), *plain(3))
    each = torch.stack([p(torch.from_numpy(grid[~known])).softmax(1) for p in fitted])
    np.testing.assert_allclose(torch.from_numpy(answers[~known]).softmax(1), each.mean(0), atol=1e-5)
    direct = probes.answer(store, np.flatnonzero(~known), *plain(3), fitted)
    np.testing.assert_allclose(answers[~known], direct)


def test_a_probe_of_a_real_cache_reads_the_label_off_the_features(tmp_path):
    items = write_items(tmp_path / "in", 20)
    dataset, teacher = decoded(items, tmp_path / "cache"), CountingTeacher()
    store = cache_teacher(teacher, dataset, tmp_path / "cache")
    mean, std = probes.channel_statistics(store)
    answers, _ = probes.cross_fit_probes(store, dataset, mean, std)
    true = np.stack([dataset.labels[i, 0, ::4, ::4] for i in range(20)])
    assert (answers.argmax(1) == true).mean() > 0.95
    blank = write_items(tmp_path / "blank", 20, informative=False)
    dataset = decoded(blank, tmp_path / "cache")
    store = cache_teacher(teacher, dataset, tmp_path / "cache")
    answers, _ = probes.cross_fit_probes(store, dataset, *probes.channel_statistics(store))
    true = np.stack([dataset.labels[i, 0, ::4, ::4] for i in range(20)])
    assert 0.4 < (answers.argmax(1) == true).mean() < 0.6


def test_one_labelled_group_is_too_few(tmp_path):
    store = store_of(np.zeros((4, 3, 2, 2), np.float32), tmp_path / "s")
    with pytest.raises(ValueError) as error:
        probes.cross_fit_probes(store, Labels(cells([0, 1, 0, 1]), groups=["a"] * 4), *plain(3))
    assert "\n" not in str(error.value)


def test_cell_targets_are_area_fractions_of_the_labelled_samples():
    labels = np.zeros((70, 4, 4), np.uint8)
    labels[68, :2, 0] = 1
    targets = probes.cell_targets(Labels(labels), np.array([68, 0]), 2, (2, 2))
    assert targets.shape == (2, 2, 2, 2)
    assert targets[0, 1].tolist() == [[0.5, 0], [0, 0]] and (targets[1, 1] == 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(2, 2, 2))


def test_a_probe_equals_logistic_regression():
    """At the optimum the gradient of the penalised loss vanishes."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn((30, 4, 3, 3), generator=rng)
    label = (features[:, 0] + torch.randn((30, 3, 3), generator=rng) > 0).long()
    targets = torch.nn.functional.one_hot(label, 2).permute(0, 3, 1, 2).float()
    probe = probes.fit_probe(features, targets, steps=200)
    bias = probe(torch.zeros(1, 4, 1, 1))[0, :, 0, 0]
    weight = (probe(torch.eye(4)[:, :, None, None])[..., 0, 0] - bias).T  # of each unit vector of features
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    logits = torch.einsum("kc,nchw->nkhw", weight, features) + bias[:, None, None]
    loss = torch.nn.functional.cross_entropy(logits, label) + probes.WEIGHT_DECAY * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3
    assert weight[1, 0] - weight[0, 0] > 1


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_calibration_temperature_recovers_a_planted_scale(scale):
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn((60, 2, 10, 10), generator=rng)
    label = (torch.rand((60, 10, 10), generator=rng) < logits.softmax(1)[:, 1]).long()
    targets = torch.nn.functional.one_hot(label, 2).permute(0, 3, 1, 2).float()
    assert probes.fit_calibration(logits * scale, targets).temperature == pytest.approx(scale, rel=0.06)


def test_calibration_recovers_planted_offsets_and_leaves_a_class_without_targets_alone():
    rng = torch.Generator().manual_seed(1)
    logits, planted = 2 * torch.randn((200, 4, 8, 8), generator=rng), torch.tensor([0.0, 1.5, -1.0, 0.0])
    logits[:, 3] -= 40  # never drawn, never seen
    p = (logits / 1.5 + planted[:, None, None]).softmax(1)
    label = torch.multinomial(p.movedim(1, -1).flatten(0, 2), 1, generator=rng).view(200, 8, 8)
    targets = torch.nn.functional.one_hot(label, 4).movedim(-1, 1).float()
    found = probes.fit_calibration(logits, targets, groups=200)
    assert found.temperature == pytest.approx(1.5, rel=0.06) and found.offsets[0] == found.offsets[3] == 0
    assert found.offsets[1:3] == pytest.approx((1.5, -1.0), abs=0.1)
    drawn, true = found(logits).softmax(1)[:, 1].sum(), (label == 1).sum()
    assert float(drawn / true) == pytest.approx(1, abs=0.01)  # what is too little by itself is right in the mean
    few = probes.fit_calibration(logits, targets, groups=probes.LEAST_GROUPS)
    assert 0.5 < few.offsets[1] < found.offsets[1] - 0.05  # few groups speak less for others
    assert probes.fit_calibration(logits, targets, groups=probes.LEAST_GROUPS - 1).offsets == ()


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 2, 1)], ids=["classes", "findings"])
def test_sure_answers_that_know_nothing_of_an_image_are_brought_to_the_prior(shape):
    rng = torch.Generator().manual_seed(3)
    prior = np.array([0.7, 0.2, 0.1]) if shape[0] == 3 else np.array([[0.9, 0.4], [0.1, 0.6]])
    p = torch.from_numpy(prior).float().view(shape).expand(4000, *shape)
    label = torch.multinomial(p.movedim(1, -1).flatten(0, 2), 1, generator=rng).view(4000, *shape[1:])
    targets = torch.nn.functional.one_hot(label, shape[0]).movedim(-1, 1).float()
    noise = 2 * torch.randn((4000, *shape), generator=rng)
    found = probes.fit_calibration(p.log() + noise, targets, prior=prior)
    entropy = -(prior * np.log(prior)).sum(0).mean()
    loss = -(targets * found(p.log() + noise).log_softmax(1)).sum(1).mean()
    assert found.temperature == pytest.approx(8) and float(loss) == pytest.approx(entropy, rel=0.06)
    without = probes.fit_calibration(p.log() + noise, targets)
    assert -(targets * without(p.log() + noise).log_softmax(1)).sum(1).mean() > 1.15 * entropy  # near equal classes
    assert torch.equal(found(noise[..., 0]), found(noise)[..., 0])  # of maps and of vectors alike


def test_offsets_that_would_leave_a_weak_answer_without_foreground_are_not_taken():
    rng = torch.Generator().manual_seed(2)
    label = torch.zeros(20, 8, 8, dtype=torch.long)
    label[:, 2:5, 2:5] = 1
    guess = (torch.rand((20, 8, 8), generator=rng) < 0.3) | (label == 1)  # a third of what it draws is right
    targets = torch.nn.functional.one_hot(label, 2).movedim(-1, 1).float()
    logits = 0.5 * torch.randn(targets.shape, generator=rng) + torch.stack([~guess, guess], 1)
    found = probes.fit_calibration(logits, targets, groups=20)
    assert found.offsets == () and torch.equal(found(logits).argmax(1), logits.argmax(1))


def test_the_calibration_temperature_stays_in_its_range():
    logits = torch.zeros(4, 2, 3, 3)
    logits[:, 1] = 5.0
    right = torch.zeros(4, 2, 3, 3)
    right[:, 1] = 1
    assert 0.25 <= probes.fit_calibration(logits, right).temperature < 1
    assert probes.fit_calibration(logits, right.flip(1)).temperature == pytest.approx(8.0)
    assert probes.fit_calibration(0 * logits, right).temperature == pytest.approx(1.0)


def test_channel_statistics_are_those_of_numpy(tmp_path):
    rng = np.random.default_rng(5)
    grid = (
        rng.normal(size=(70, 4, 3, 2)) * np.array([0.01, 1, 30, 0])[:, None, None]
        + np.array([5, 0, 100, 7])[:, None, None]
    )
    mean, std = probes.channel_statistics(store_of(grid.astype(np.float32), tmp_path / "s"))
    np.testing.assert_allclose(mean, grid.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(std, [*grid.std((0, 2, 3))[:3], 1.0], rtol=1e-4)  # a constant channel is left alone
    assert mean.dtype == std.dtype == torch.float32


def test_standardised_features_have_mean_zero_and_deviation_one(tmp_path):
    grid = np.random.default_rng(6).normal(3, 7, size=(50, 2, 3, 3)).astype(np.float32)
    store = store_of(grid, tmp_path / "s")
    features = probes.standardised(store, np.arange(50), *probes.channel_statistics(store))
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
