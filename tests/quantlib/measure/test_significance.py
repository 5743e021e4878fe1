import numpy as np
import pytest

from quantlib.measure import significance


def answers(both, lost, won, neither):
    first = np.repeat([True, True, False, False], [both, lost, won, neither])
    second = np.repeat([True, False, True, False], [both, lost, won, neither])
    return first, second


def test_exact_mcnemar_is_the_binomial_tail():
    stats = pytest.importorskip("scipy.stats")
    for lost, won in ((9, 1), (3, 3), (0, 0), (40, 21), (1500, 1400)):
        expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
        found = significance.paired_drop(*answers(5000, lost, won, 100))
        assert found.p_value == pytest.approx(expected, rel=1e-9)


def test_interval_is_that_of_agresti_and_min():
    # Agresti and Min 2005: (b* - c*) / n* and its Wald interval, with b* = b + 1/2, c* = c + 1/2, n* = n + 2.
    found = significance.paired_drop(*answers(60, 20, 10, 10))
    b, c, n = 20.5, 10.5, 102
    center, deviation = (b - c) / n, ((b + c) / n - ((b - c) / n) ** 2) ** 0.5 / n**0.5
    assert found.drop == 0.1
    assert found.low == pytest.approx(center - 1.959964 * deviation, abs=1e-6)
    assert found.high == pytest.approx(center + 1.959964 * deviation, abs=1e-6)


def test_interval_holds_the_true_drop_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        kind = rng.choice(4, 1000, p=[0.8, 0.03, 0.02, 0.15])
        found = significance.paired_drop(kind <= 1, (kind == 0) | (kind == 2))
        hits += found.low <= 0.01 <= found.high
    assert 0.93 < hits / 1000 < 0.97


def test_more_images_narrow_the_interval_as_images_to_tell_says():
    few = significance.paired_drop(*answers(840, 30, 20, 110))
    needed = significance.images_to_tell(few, 1000, 0.02)
    assert needed is not None
    assert needed > 1000
    factor = needed / 1000
    many = significance.paired_drop(*answers(*(round(count * factor) for count in (840, 30, 20, 110))))
    assert many.high == pytest.approx(0.02, abs=5e-4)


def test_answers_about_different_images_are_refused():
    with pytest.raises(ValueError, match="the same images"):
        significance.paired_drop(np.array([True]), np.array([True, False]))


def test_slower_is_what_most_rounds_say_and_not_the_medians():
    machine = np.random.default_rng(0).uniform(1, 3, 50)  # A machine that slows down and recovers.
    assert significance.is_slower(machine * 1.02, machine)
    assert not significance.is_slower(machine, machine * 1.02)
    other_rounds = np.random.default_rng(1).permutation(machine)
    assert np.median(other_rounds * 1.02) > np.median(machine)
    assert not significance.is_slower(other_rounds * 1.02, machine)


def test_equal_speed_is_taken_for_different_no_more_often_than_the_level():
    random = np.random.default_rng(2)
    found = [significance.is_slower(random.gamma(4, size=50), random.gamma(4, size=50)) for _ in range(1000)]
    assert 0 < sum(found) < 50  # One side of a two-sided test at 5%.
    assert not significance.is_slower([1.0] * 10, [1.0] * 10)


def test_less_accurate_is_what_chance_does_not_explain():
    assert significance.is_less_accurate(*answers(60, 2, 20, 10))
    assert not significance.is_less_accurate(*answers(60, 20, 2, 10))
    assert not significance.is_less_accurate(*answers(60, 2, 5, 10))


def test_wilsons_interval():
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3: 81 of 263, and 0 of 20.
    assert significance.proportion_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert significance.proportion_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_the_unpaired_interval_is_newcombes():
    # Newcombe 1998, table II, (a): 56 of 70 and 48 of 80.
    assert significance.unpaired_interval(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
