import numpy as np
import pytest

from quantlib.measure.confidence_sequence import sequential_drop

LOOKS = range(100, 1001, 100)


def shuffled(lost, won, same, seed=0):
    kinds = np.random.default_rng(seed).permutation(np.repeat([1, -1, 0], [lost, won, same]))
    return kinds >= 0, kinds <= 0


@pytest.mark.parametrize("finite", [True, False])
def test_the_true_drop_is_in_all_intervals_together_as_often_as_they_say(finite):
    # At 80%, so that 120 runs tell. Looked at ten times each, an interval for one look would miss far more.
    rng, missed = np.random.default_rng(0), 0
    for seed in range(120):
        if finite:
            correct, other, num_images = *shuffled(20, 10, 970, seed), 1000
        else:
            kinds = rng.choice([1, -1, 0], 1000, p=[0.02, 0.01, 0.97])
            correct, other, num_images = kinds >= 0, kinds <= 0, None
        found = [sequential_drop(correct[:count], other[:count], 0.8, num_images) for count in LOOKS]
        missed += any(not each.low <= 0.01 <= each.high for each in found)
    assert missed / 120 < 0.2


def test_equal_models_are_rarely_taken_to_differ_however_often_one_looks():
    missed = 0
    for seed in range(100):
        correct, other = shuffled(30, 30, 940, seed)
        missed += any(sequential_drop(correct[:count], other[:count]).p_value < 0.2 for count in LOOKS)
    assert missed / 100 < 0.2


def test_the_interval_of_all_images_is_their_drop():
    found = sequential_drop(*shuffled(30, 10, 960), num_images=1000)
    assert (found.low, found.drop, found.high) == (0.02, 0.02, 0.02)


def test_images_that_are_not_there_yet_bound_the_interval():
    correct, other = shuffled(30, 10, 960)
    found = sequential_drop(correct[:995], other[:995], num_images=1000)
    assert found.low >= 0.02 - 10 / 1000
    assert found.high <= 0.02 + 10 / 1000


def test_the_interval_narrows_with_images_and_widens_with_confidence():
    correct, other = shuffled(100, 50, 4850)
    few, many = (sequential_drop(correct[:count], other[:count]) for count in (500, 4000))
    sure = sequential_drop(correct[:4000], other[:4000], 0.99)
    finite = sequential_drop(correct[:4000], other[:4000], num_images=5000)
    assert few.high - few.low > many.high - many.low
    assert sure.low < many.low < finite.low < finite.drop < finite.high < many.high < sure.high


def test_a_clear_difference_is_seen_in_few_images():
    assert sequential_drop(*shuffled(40, 10, 450)).low > 0
    assert sequential_drop(*shuffled(40, 10, 450)).p_value < 0.01


def test_the_ends_are_the_means_that_betting_just_rules_out():
    # By its definition, image by image: the gambler's money after bets that the mean is higher.
    correct, other = shuffled(12, 4, 384)
    found = sequential_drop(correct, other, 0.95, 1000)

    def money(mean):
        total = 0.0
        for bet in (0.125, 0.25, 0.5):
            own, seen = 1 / 3, 0
            for number, difference in enumerate(correct.astype(int) - other):
                own *= 1 + bet * (difference - (1000 * mean - seen) / (1000 - number))
                seen += difference
            total += own
        return total

    assert money(found.low - 1e-5) > 40 > money(found.low + 1e-5)


@pytest.mark.parametrize(("count", "others", "num_images"), [(0, 0, None), (3, 2, None), (3, 3, 2)])
def test_answers_that_do_not_match_are_refused(count, others, num_images):
    with pytest.raises(ValueError, match="both must cover the same images"):
        sequential_drop(np.ones(count, bool), np.ones(others, bool), num_images=num_images)
