"""Folds with every class in proportion, groups whole."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from amkd_monai.data.splits import k_fold


def items(groups):
    """Items from (class, size) per group."""
    return [
        {"id": f"{g}-{n}", "group": f"g{g}", "class": name}
        for g, (name, size) in enumerate(groups)
        for n in range(size)
    ]


def by_class(item):
    return item["class"]


def test_single_items_are_dealt_out_evenly():
    data = items([("a", 1)] * 50 + [("b", 1)] * 20 + [("c", 1)] * 10)
    for fold in range(5):
        test = k_fold(data, 5, fold)[2]
        assert Counter(map(by_class, test)) == {"a": 10, "b": 4, "c": 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=12, max_size=60), st.integers(0, 9))
def test_groups_stay_whole_and_every_item_is_tested_once(groups, seed):
    data = items(groups)
    tested = []
    for fold in range(3):
        sections = k_fold(data, 3, fold, seed=seed)
        assert all(sections)
        found = [{item["group"] for item in section} for section in sections]
        assert not (found[0] & found[1] | found[0] & found[2] | found[1] & found[2])
        assert sum(map(len, sections)) == len(data)
        tested += [item["id"] for item in sections[2]]
        for name, total in Counter(map(by_class, data)).items():
            count = sum(item["class"] == name for item in sections[2])
            assert abs(count - total / 3) <= 6, "a group and a half at most"
    assert sorted(tested) == sorted(item["id"] for item in data)


def test_the_order_of_the_items_does_not_matter_but_the_seed_does():
    data = items([("a", 1), ("b", 2)] * 15)
    first = k_fold(data, seed=1)
    assert first == k_fold(data[::-1], seed=1)
    assert first != k_fold(data, seed=2)
