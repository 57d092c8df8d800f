"""Checkpoints in the official layouts, filled deterministically, and mistakes that a check must notice."""

import contextlib
import time

import torch
from reference import fill

INTEGERS = ("relative_position_index", "num_batches_tracked")
TOLERANCE = 2e-5
"""Rounding makes up to 1.1e-5 (the UPerNet by oneDNN's AVX2 kernels); every mistake but a wrong epsilon, over 1e-2."""


def state(name):
    """The state dict of a key list."""
    return {
        key: torch.zeros(shape, dtype=torch.int64)
        if key.endswith(INTEGERS)
        else torch.from_numpy(fill.tensor(key, shape))
        for key, shape in fill.keys(name).items()
    }


def errors(name, outputs):
    """{output: deviation} of all recorded outputs; prints them."""
    recorded = fill.golden(name)
    found = {key: fill.difference(recorded[key], value.detach()) for key, value in outputs.items()}
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    return found


def assert_golden(name, outputs, without=()):
    """Every recorded output (but for those in ``without``) is given and agrees."""
    assert set(outputs) == set(fill.golden(name)) - set(without)
    found = errors(name, outputs)
    assert max(found.values()) < TOLERANCE, found


def assert_noticed(name, outputs):
    """At least one output deviates, so the mistake would not pass."""
    found = errors(name, outputs)
    assert max(found.values()) > TOLERANCE, found


def assert_epsilon_noticed(name, right, wrong):
    """A wrong LayerNorm epsilon makes only 1e-5 to 1e-4: more than twice what rounding makes on this processor."""
    with_it, without = errors(name, wrong), errors(name, right)
    assert max(with_it.values()) > 2 * max(without.values()), (with_it, without)


@contextlib.contextmanager
def wrong_epsilon(network, eps=1e-5):
    """Every LayerNorm with another epsilon."""
    norms = {m: m.eps for m in network.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert norms and set(norms.values()) != {eps}
    for norm in norms:
        norm.eps = eps
    yield
    for norm, before in norms.items():
        norm.eps = before


@contextlib.contextmanager
def exchanged(first, second):
    """Two tensors of one shape in each other's place."""

    def exchange():
        with torch.no_grad():
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)

    exchange()
    yield
    exchange()


def query_value_swapped(attention):
    """The query and value rows of one block's projection exchanged."""
    query, _, value = attention.qkv.weight.chunk(3)
    return exchanged(query, value)


def norms_swapped(block):
    """The two LayerNorms of one block exchanged."""
    return exchanged(block.norm1.weight, block.norm2.weight)


@contextlib.contextmanager
def timed(what):
    """Print how long something takes."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s")
