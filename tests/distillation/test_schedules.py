import itertools
import math

import pytest

from amkd_monai.distillation.distiller import distillation_strength, kd_temperature

STEPS = [i / 200 for i in range(201)]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_temperature_falls_from_start_to_end(shape):
    values = [kd_temperature(p, 4.0, 1.0, shape) for p in STEPS]
    assert values[0] == pytest.approx(4) and values[-1] == pytest.approx(1) and values[100] == pytest.approx(2.5)
    assert values == sorted(values, reverse=True)


def test_the_shapes_differ_where_they_should():
    assert kd_temperature(0.25, 4.0, 1.0) == pytest.approx(3.25)
    assert kd_temperature(0.25, 4.0, 1.0, "cosine") == pytest.approx(1 + 1.5 * (1 + math.cos(math.pi / 4)))
    assert kd_temperature(0.7) == 2.0


def test_wrong_temperatures_are_named():
    with pytest.raises(ValueError, match=r"0\.5"):
        kd_temperature(0.0, 4.0, 0.5)
    with pytest.raises(ValueError, match="stairs"):
        kd_temperature(0.0, shape="stairs")


def test_the_strength_warms_up_stays_and_gives_the_task_the_last_word():
    values = [distillation_strength(p) for p in STEPS]
    assert values[0] == 0 and distillation_strength(0.025) == pytest.approx(0.5)
    assert all(v == 1 for p, v in zip(STEPS, values, strict=True) if 0.05 <= p <= 0.7)
    assert distillation_strength(0.85) == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)
    falling = values[140:]
    assert falling == sorted(falling, reverse=True)
    assert all(abs(a - b) < 0.11 for a, b in itertools.pairwise(values))  # no jumps


def test_a_constant_strength_is_possible():
    assert {distillation_strength(p, warmup=0.0, decay=0.0) for p in STEPS} == {1.0}
