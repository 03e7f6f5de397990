from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaprune.cut_schedule import CutSchedule, stage_shares
from hf_adaprune.errors import ConfigError


@given(
    st.floats(0.01, 0.9),
    st.integers(1, 12),
    st.sampled_from(["linear", "geometric"]),
    st.sampled_from(["linear", "constant", "cosine"]),
)
def test_cuts_ascend_to_the_ratio_and_leave_training_after_each(
    ratio: float, cuts: int, targets: str, spacing: str
) -> None:
    schedule = CutSchedule(cuts=cuts, targets=targets, spacing=spacing)
    ratios, steps = schedule.ratios(ratio), schedule.steps(ratio, 1000)
    assert len(ratios) == len(steps) == cuts
    assert list(ratios) == sorted(ratios)
    assert ratios[-1] == ratio
    assert steps[0] == 0
    assert len(set(steps)) == cuts
    assert steps[-1] < 1000


@given(st.floats(0.05, 0.8))
def test_without_a_number_each_cut_removes_about_a_twentieth(ratio: float) -> None:
    """Stage counts of the published runs: round(ln(N0 / N1) / -ln 0.95)."""
    schedule = CutSchedule()
    ratios = (0.0, *schedule.ratios(ratio))
    shares = [1 - (1 - after) / (1 - before) for before, after in pairwise(ratios)]
    assert all(math.isclose(share, shares[0], rel_tol=1e-9) for share in shares)
    assert 0.02 < shares[0] < 0.08
    assert schedule.count(1 - 143.1 / 376.1) == round(math.log(376.1 / 143.1) / -math.log(0.95))


def test_linear_targets_remove_equal_numbers() -> None:
    assert CutSchedule(cuts=4, targets="linear").ratios(0.4) == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_shares_of_the_stages() -> None:
    assert stage_shares(4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert stage_shares(4, "constant") == pytest.approx([0.25] * 4)
    cosine = stage_shares(4, "cosine")
    assert sum(cosine) == pytest.approx(1)
    assert list(cosine) == sorted(cosine)


@given(st.integers(1, 10**6), st.data())
def test_a_fraction_that_is_a_step_cuts_after_it(total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    assert CutSchedule(at=(step / total,)).steps(0.3, total) == (step,)
    if step:  # and not before it is made
        assert CutSchedule(at=((step - 0.001) / total,)).steps(0.3, total) == (step - 1,)


def test_steps_by_number_by_fraction_and_at_the_ends() -> None:
    assert CutSchedule(every=10, cuts=3).steps(0.3, 100) == (0, 10, 20)
    assert CutSchedule(at=(0.1, 0.5)).steps(0.3, 100) == (10, 50)
    assert CutSchedule(at=(0.28, 0.29)).steps(0.3, 100) == (28, 29)
    assert CutSchedule(mode="once").steps(0.3, 100) == (0,)
    assert CutSchedule(mode="at_end").steps(0.3, 100) == (100,)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"mode": "later"}, "mode"),
        ({"at": (0.5, 0.2)}, "ascend"),
        ({"at": (0.5,), "every": 3}, "Leave out one"),
        ({"at": (0.1, 0.5), "cuts": 3}, "names 2 times"),
        ({"mode": "once", "cuts": 3}, "progressive"),
        ({"cuts": 0}, "cuts"),
        ({"share": 0.0}, "share"),
        ({"targets": "square"}, "targets"),
        ({"at": (1.0,)}, "fractions"),
    ],
)
def test_contradictions_are_refused(fields: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        CutSchedule(**fields)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few for 5 cuts"):
        CutSchedule(cuts=5).steps(0.3, 4)
    with pytest.raises(ConfigError, match="12 optimizer steps"):
        CutSchedule(every=10, cuts=3).steps(0.3, 12)
