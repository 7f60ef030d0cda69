"""The measures of reward watch against NumPy, Python's statistics and values worked out by hand."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.rl.watch_measures import (
    change,
    collapsed_share,
    correlation,
    duplicate_share,
    mean_known,
    near_best,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(NUMBERS | st.none(), NUMBERS | st.none(), st.integers(0, 3)), max_size=24))
def test_correlation_is_pearsons_of_what_is_left_of_the_group_means(rows):
    """Oracle: the groups' means taken away by a regression on one indicator per group, then numpy's corrcoef."""
    found = correlation(*([row[i] for row in rows] for i in range(3)))
    known = [row for row in rows if row[0] is not None and row[1] is not None]
    if len(known) < 2:
        assert found is None
        return
    groups = sorted({g for _, _, g in known})
    design = np.array([[float(g == h) for h in groups] for _, _, g in known])
    left = []
    for column in range(2):
        values = np.array([row[column] for row in known])
        left.append(values - design @ np.linalg.lstsq(design, values, rcond=None)[0])
    scales = [max(1e-9, max(abs(row[column]) for row in known)) for column in range(2)]
    if any(np.abs(rest).max() < 1e-6 * scale for rest, scale in zip(left, scales, strict=True)):
        return  # so near to constant that the oracle's own rounding shows
    assert found == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-6)


def test_correlation_by_hand():
    # Pooled, the longer group is the better one; within groups longer is worse.
    lengths, rewards, groups = [1.0, 2.0, 11.0, 12.0], [1.0, 0.0, 11.0, 10.0], [0, 0, 1, 1]
    assert statistics.correlation(lengths, rewards) > 0.9
    assert correlation(lengths, rewards, groups) == pytest.approx(-1.0)
    # Differences from the means: (-1, 0, 1) and (0, -1, 1), so 1 / 2.
    assert correlation([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [5, 5, 5]) == pytest.approx(0.5)
    assert correlation([1.0, None, 3.0, 2.0], [2.0, 9.0, 3.0, 1.0], [5, 5, 5, 5]) == pytest.approx(0.5)
    assert correlation([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], [0, 0, 0]) is None  # 0.1 and its mean differ by rounding
    assert correlation([1.0, 2.0], [1.0, 2.0], [0, 1]) is None
    assert correlation([], [], []) is None
    assert correlation([1e-200, 2e-200], [1e200, 2e200], [0, 0]) == pytest.approx(1.0)


def test_duplicates_by_hand():
    assert duplicate_share(list("aaaa"), [0] * 4) == 1.0
    assert duplicate_share(list("abcd"), [0] * 4) == 0.0
    assert duplicate_share(list("aab") + list("xyz"), [0, 0, 0, 1, 1, 1]) == pytest.approx((1 / 2 + 0) / 2)
    assert duplicate_share(list("aa"), [0, 1]) is None  # the same in two groups is no duplicate


def test_collapsed_groups_by_hand():
    texts, groups = list("aabb") + list("cd"), [0, 0, 1, 1, 2, 2]
    assert collapsed_share(texts, [0.0] * 6, groups, best=0.9) == pytest.approx(2 / 3)
    assert collapsed_share(texts, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], groups, best=0.9) == pytest.approx(1 / 3)
    assert collapsed_share(texts, [None] * 6, groups, best=0.9) == pytest.approx(2 / 3)
    assert collapsed_share(["a"], [0.0], [0], best=0.9) is None


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (0.0, 1.0, 0.9),
        (0.5, 1.0, 0.9),  # 0 belongs to the scale though it was never given
        (-1.0, 1.0, 0.8),
        (-2.0, -1.0, -0.2),
        (0.0, 0.0, math.inf),
    ],
)
def test_near_best(lowest, highest, expected):
    assert near_best(lowest, highest) == pytest.approx(expected)


@settings(max_examples=80, deadline=None)
@given(st.lists(NUMBERS, min_size=4, max_size=30), st.floats(0.0, 10.0))
def test_change_is_welchs_t_and_cohens_d(means, spread):
    found = change(means, [spread] * len(means))
    assert found is not None
    half = len(means) // 2
    old, new = means[:half], means[-half:]
    difference = statistics.fmean(new) - statistics.fmean(old)
    variances = statistics.variance(old), statistics.variance(new)
    assert (found.before, found.after) == pytest.approx((statistics.fmean(old), statistics.fmean(new)), abs=1e-6)
    if min(variances) > 1e-6:
        assert found.t == pytest.approx(difference / math.sqrt(sum(variances) / half), rel=1e-6, abs=1e-6)
        deviation = math.sqrt(spread**2 + sum(variances) / 2)
        assert found.effect == pytest.approx(difference / deviation, rel=1e-6, abs=1e-6)


def test_change_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    means = [draw.gauss(i / 9, 1.0) for i in range(20)]
    found = change(means, [1.0] * 20)
    assert found is not None
    expected = stats.ttest_ind(means[10:], means[:10], equal_var=False)
    assert found.t == pytest.approx(expected.statistic)


def test_change_by_hand():
    found = change([1.0, 3.0, 100.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0, 2.0])  # the middle one is left out
    assert found is not None
    assert (found.before, found.after, found.growth) == (2.0, 6.0, 2.0)
    # Sample variances 2 and 2: t = 4 / sqrt(2/2 + 2/2), d = 4 / sqrt(4 + 2).
    assert found.t == pytest.approx(4 / math.sqrt(2))
    assert found.effect == pytest.approx(4 / math.sqrt(6))
    assert found.rises(2.8, 1.6)
    assert not found.rises(2.9, 1.6)
    assert not found.rises(2.8, 1.7)
    down = change([6.0, 6.0, 2.0, 2.0], [0.0] * 4)
    assert down is not None
    assert down.falls(3.0, 0.25)
    assert down.t == down.effect == -math.inf
    flat = change([0.0] * 4, [0.0] * 4)
    assert flat is not None
    assert (flat.t, flat.effect) == (0.0, 0.0)
    assert not flat.growth > 0
    assert change([1.0, 2.0, 3.0], [1.0] * 3) is None


def test_mean_of_what_is_known():
    assert mean_known([None, 1.0, 2.0]) == 1.5
    assert mean_known([None]) is None
