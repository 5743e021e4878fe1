import numpy as np
import pytest

from quantlib.measure.ranking import certainty_faster, is_order_certain


def times(ms, count, noise=0.01, seed=0):
    return ms * np.exp(np.random.default_rng(seed).normal(0, noise, count))


def test_a_clear_difference_is_certain_after_ten_rounds():
    assert certainty_faster(times(1.0, 10), times(1.5, 10, seed=1)) > 0.99
    assert certainty_faster(times(1.5, 10), times(1.0, 10, seed=1)) == 0


def test_certainty_is_one_minus_the_inverse_of_what_the_bets_are_worth():
    own, others = [1, 1, 1, 2, 5], [2, 2, 2, 1, 5]  # Won thrice, lost once, tied once.
    worth = np.mean([(1 + bet) ** 3 * (1 - bet) for bet in (0.25, 0.5, 0.9)])
    assert certainty_faster(own, others) == pytest.approx(1 - 1 / worth)


def test_equal_models_are_rarely_told_apart_however_often_one_asks():
    wrong = 0
    for seed in range(200):
        own, other = times(1.0, 200, seed=(seed, 0)), times(1.0, 200, seed=(seed, 1))
        wrong += any(certainty_faster(own[:count], other[:count]) >= 0.9 for count in range(10, 201, 5))
    assert wrong / 200 < 0.1


def test_the_order_is_certain_once_every_neighbour_is_clearly_slower_or_tied():
    models = [times(ms, 200, seed=number) for number, ms in enumerate((2.0, 1.0, 1.5))]
    # As fast as the first, within two percent: certain only with many rounds.
    models.append(times(2.01, 200, seed=9))

    def is_certain(count, number):
        return is_order_certain([each[:count] for each in models[:number]], range(number))

    assert is_certain(15, 3)
    assert not is_certain(15, 4)
    assert is_certain(200, 4)


def test_a_difference_that_noise_hides_stays_open():
    assert not is_order_certain([times(1.0, 30, noise=0.1), times(1.01, 30, noise=0.1, seed=1)], "ab")


def test_only_the_fastest_runtime_of_each_file_takes_part_in_the_order():
    # Two slow runtimes of different files are as close as can be; each is clearly slower than its file's other one.
    slow = [times(9.0, 15, noise=0.3, seed=seed) for seed in (3, 4)]
    models = [times(1.0, 15), slow[0], times(2.0, 15, seed=1), slow[1]]

    assert is_order_certain(models, "aabb")
    assert not is_order_certain(models, "abcd")


def test_one_model_is_in_order():
    assert is_order_certain([[1.0]], "a")
