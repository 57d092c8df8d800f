import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amkd_monai.data.splits import (
    few_labels,
    fold_of_groups,
    identical,
    joined,
    k_fold,
    random_split,
    split_hash,
)


def make_items(groups):
    """One labelled item per entry of `groups`."""
    return [
        {"image": f"/a/{i:03d}.png", "label": f"/b/{i:03d}.png", "id": f"{i:03d}", "group": group}
        for i, group in enumerate(groups)
    ]


def ids(items):
    return [item["id"] for item in items]


def assert_partition(items, sections):
    """Every item is in exactly one section, and no group in two."""
    assert sorted(ids(items)) == sorted(name for section in sections for name in ids(section))
    groups = [{item["group"] for item in section} for section in sections]
    assert sum(map(len, groups)) == len(set().union(*groups))


many_groups = st.lists(st.integers(0, 12).map(str), min_size=3, max_size=60).filter(lambda g: len(set(g)) >= 3)


@settings(max_examples=100, deadline=None)
@given(groups=many_groups, seed=st.integers(0, 5))
def test_random_split_never_cuts_a_group_and_fills_every_section(groups, seed):
    items = make_items(groups)
    sections = random_split(items, seed=seed)
    assert_partition(items, sections)
    assert all(sections)


@settings(max_examples=100, deadline=None)
@given(groups=many_groups, folds=st.integers(3, 6), seed=st.integers(0, 5))
def test_k_fold_tests_every_item_once_and_never_cuts_a_group(groups, folds, seed):
    items = make_items(groups)
    tested = Counter()
    for fold in range(min(folds, len(set(groups)))):
        sections = k_fold(items, folds, fold, seed=seed)
        assert_partition(items, sections)
        assert all(sections)
        tested.update(ids(sections[2]))
    assert tested == Counter(ids(items))


@settings(max_examples=100, deadline=None)
@given(groups=many_groups, count=st.integers(1, 60), seed=st.integers(0, 5))
def test_few_labels_never_cuts_a_group(groups, count, seed):
    items = make_items(groups)
    if min(Counter(groups).values()) > count or count > len(items):
        with pytest.raises(ValueError, match="labelled"):
            few_labels(items, count, seed)
        return
    labelled, unlabelled = few_labels(items, count, seed)
    assert_partition(items, (labelled, unlabelled))
    assert 1 <= len(labelled) <= count
    assert all("label" in item for item in labelled)
    assert not any("label" in item for item in unlabelled)
    assert all("label" in item for item in items)  # the input is left as it was


def test_random_split_has_the_wanted_sizes():
    sections = random_split(make_items(map(str, range(154))))
    assert [len(section) for section in sections] == [108, 23, 23]


def test_random_split_leaves_a_section_with_fraction_zero_empty():
    train, validation, test = random_split(make_items(map(str, range(10))), (0.8, 0.2, 0))
    assert (len(train), len(validation), len(test)) == (8, 2, 0)


def test_splits_are_reproducible_and_ignore_the_order_of_the_items():
    items = make_items(map(str, range(40)))
    for function in (random_split, k_fold):
        assert function(items, seed=3) == function(items[::-1], seed=3)
        assert function(items, seed=3) != function(items, seed=4)


def test_random_split_is_the_same_on_every_machine():
    """Pinned values: whoever changes them changes the split of every run that is to be repeated."""
    _, validation, test = random_split(make_items(map(str, range(20))), seed=0)
    assert (ids(validation), ids(test)) == (["001", "007", "015"], ["004", "005", "013"])


@pytest.mark.parametrize("fractions", [(0.7, 0.3), (0.7, 0.4, -0.1), (0.7, 0.15, 0.2)])
def test_random_split_refuses_bad_fractions(fractions):
    with pytest.raises(ValueError, match=r"Split fractions .* are not usable"):
        random_split(make_items("abcdef"), fractions)


def test_random_split_refuses_fewer_groups_than_sections():
    with pytest.raises(ValueError, match=r"2 group\(s\) cannot fill 3 sections"):
        random_split(make_items("aabb"))


def test_a_repeated_id_is_named():
    with pytest.raises(ValueError, match="id '000' appears twice"):
        random_split(make_items("abc") + make_items("d"))


def test_eleven_volumes_in_five_folds():
    items = make_items([*"abcdefghi", "pair", "pair"])
    sizes = [tuple(len(section) for section in k_fold(items, 5, fold)) for fold in range(5)]
    assert all(validation == 2 for _, validation, _ in sizes)
    assert sorted(test for _, _, test in sizes) == [2, 2, 2, 2, 3]


def test_k_fold_uses_fewer_folds_when_groups_are_few():
    assert [len(section) for section in k_fold(make_items("abc"), folds=5, fold=2)] == [1, 1, 1]
    with pytest.raises(ValueError, match="no fold 3: choose one from 0 to 2"):
        k_fold(make_items("abc"), folds=5, fold=3)


def test_k_fold_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="at least 3 are needed"):
        k_fold(make_items("aabb"))
    for fraction in (0, 1, 1.2):
        with pytest.raises(ValueError, match=f"validation fraction is {fraction}:"):
            k_fold(make_items("abcd"), validation_fraction=fraction)
    with pytest.raises(ValueError, match="leaves one group for train and validation: use more folds"):
        k_fold(make_items("abc"), folds=2, fold=0)


def test_fold_of_groups_balances_folds():
    groups = ["big"] * 4 + list("abcdefgh")
    folds = fold_of_groups(groups, 3)
    assert folds.dtype == np.int64
    assert sorted(Counter(folds.tolist()).values()) == [4, 4, 4]
    assert len(set(folds[:4])) == 1
    assert np.array_equal(folds[::-1], fold_of_groups(groups[::-1], 3))


def test_fold_of_groups_with_few_groups():
    assert set(fold_of_groups(["a", "a", "b"], 5)) == {0, 1}
    with pytest.raises(ValueError, match="at least 2 groups are needed"):
        fold_of_groups(["a", "a"], 2)
    with pytest.raises(ValueError, match="use at least 2 folds"):
        fold_of_groups(["a", "b"], 1)


def test_few_labels_of_one_seed_are_nested():
    items = make_items(map(str, range(30)))
    small, large = (set(ids(few_labels(items, count, seed=1)[0])) for count in (5, 12))
    assert len(small) == 5 and len(large) == 12 and small < large
    assert small != set(ids(few_labels(items, 5, seed=2)[0]))


@pytest.mark.parametrize("count", [0, 4])
def test_few_labels_refuses_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"Cannot keep {count} of 3 training items labelled: use 1 to 3"):
        few_labels(make_items("abc"), count)


def hashed(train, validation, test, unlabelled=()):
    return split_hash(train=train, validation=validation, test=test, unlabelled=unlabelled)


def test_split_hash_equals_a_reference():
    train, validation, test, unlabelled = ([item] for item in make_items("wxyz"))
    text = (
        '{"test": [["002", "y"]], "train": [["000", "w"]], "unlabelled": [["003", "z"]], "validation": [["001", "x"]]}'
    )
    assert hashed(train, validation, test, unlabelled) == hashlib.sha256(text.encode()).hexdigest()


def test_split_hash_depends_on_membership_alone():
    train, validation, test = random_split(make_items(map(str, range(20))))
    expected = hashed(train, validation, test, [])
    moved = [{**item, "image": "/elsewhere/" + item["id"]} for item in train]
    assert hashed(moved[::-1], validation, test, []) == expected
    assert hashed(train[1:], validation, test, train[:1]) != expected
    assert hashed(train, test, validation, []) != expected
    assert hashed([{**train[0], "group": "other"}, *train[1:]], validation, test, []) != expected


def test_byte_identical_images_share_a_group(tmp_path):
    contents = {"c": b"same", "a": b"same", "b": b"else", "d": b"longer"}
    items = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        items.append({"image": str(tmp_path / name), "id": name, "group": name})
    grouped = joined(items, identical(items))
    assert {item["id"]: item["group"] for item in grouped} == {"a": "a+c", "b": "b", "c": "a+c", "d": "d"}
    assert items[0]["group"] == "c"  # the input is left as it was


def labelled(counts, per_group=1):
    classes = [c for c, n in enumerate(counts) for _ in range(n)]
    return [{"id": f"i{k:03d}", "group": f"{c}-{k // per_group}", "label": c} for k, c in enumerate(classes)]


@pytest.mark.parametrize("per_group", [1, 2])
def test_classes_are_spread_over_sections_and_folds(per_group):
    items = labelled((50, 20, 10), per_group)
    seen = []
    for fold in range(5):
        train, validation, test = k_fold(items, fold=fold)
        for section, share in ((train, 0.64), (validation, 0.16), (test, 0.2)):
            for c, n in enumerate((50, 20, 10)):
                assert abs(sum(i["label"] == c for i in section) - share * n) <= per_group + 0.5
        seen += [i["id"] for i in test]
    assert sorted(seen) == [i["id"] for i in items]
    for section, share in zip(random_split(items), (0.7, 0.15, 0.15), strict=True):
        assert all(
            abs(sum(i["label"] == c for i in section) - share * n) <= per_group for c, n in enumerate((50, 20, 10))
        )


def test_a_group_of_several_classes_is_not_cut():
    items = [*labelled((10, 10)), {"id": "x", "group": "0-0", "label": 1}]
    fold = fold_of_groups([i["group"] for i in items], 4, classes=[i["label"] for i in items])
    assert fold[-1] == fold[0]


def stratified(groups):
    """Items from (class, size) per group."""
    return [
        {"id": f"{g}-{n}", "group": f"g{g}", "class": name}
        for g, (name, size) in enumerate(groups)
        for n in range(size)
    ]


def test_single_items_are_dealt_out_evenly():
    data = stratified([("a", 1)] * 50 + [("b", 1)] * 20 + [("c", 1)] * 10)
    for fold in range(5):
        test = k_fold(data, 5, fold)[2]
        assert Counter(i["class"] for i in test) == {"a": 10, "b": 4, "c": 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=12, max_size=60), st.integers(0, 9))
def test_groups_stay_whole_and_every_item_is_tested_once(groups, seed):
    data = stratified(groups)
    tested = []
    for fold in range(3):
        sections = k_fold(data, 3, fold, seed=seed)
        assert all(sections)
        found = [{item["group"] for item in section} for section in sections]
        assert not (found[0] & found[1] | found[0] & found[2] | found[1] & found[2])
        assert sum(map(len, sections)) == len(data)
        tested += [item["id"] for item in sections[2]]
        for name, total in Counter(i["class"] for i in data).items():
            count = sum(item["class"] == name for item in sections[2])
            assert abs(count - total / 3) <= 6, "a group and a half at most"
    assert sorted(tested) == sorted(item["id"] for item in data)


def test_the_order_of_the_items_does_not_matter_but_the_seed_does():
    data = stratified([("a", 1), ("b", 2)] * 15)
    first = k_fold(data, seed=1)
    assert first == k_fold(data[::-1], seed=1)
    assert first != k_fold(data, seed=2)
