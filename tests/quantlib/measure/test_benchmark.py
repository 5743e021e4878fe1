"""Timing. No test here asserts a time: the machine is shared with other work."""

import random
from collections import Counter
from itertools import count, pairwise, permutations

import pytest
import torch
from torch import Tensor, nn

from quantlib.measure import benchmark

NUM_WARM_UP = 2


class _Model(nn.Module):
    """Returns its input."""

    def arrange(self, x):
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, x):
        return x


class _Recorder(_Model):
    """Notes each call in a list shared by several models."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, len(x), torch.get_num_threads()))
        return x


@pytest.fixture
def calls():
    return []


@pytest.fixture
def inputs():
    return torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)


def test_every_round_times_each_model_once_after_an_untimed_call(calls, inputs):
    models = [_Recorder(name, calls) for name in "abc"]

    benchmark.time_models(lambda _: models, inputs, [1], [1], num_samples=12)

    order = "".join(name for name, _, _ in calls)
    warm_up = "a" * NUM_WARM_UP + "b" * NUM_WARM_UP + "c" * NUM_WARM_UP
    assert order.startswith(warm_up)
    rounds = [order[start : start + 6] for start in range(len(warm_up), len(order), 6)]
    assert len(rounds) == 12
    assert {"".join(sorted(turns)) for turns in rounds} == {"aabbcc"}
    assert all(turns[0::2] == turns[1::2] for turns in rounds)


def test_every_model_follows_every_other_about_equally_often(calls, inputs):
    # In a fixed order, a model that follows another runtime is slower in every round: bias mistaken for a difference.
    models = [_Recorder(name, calls) for name in "abc"]

    benchmark.time_models(lambda _: models, inputs, [1], [1], num_samples=50)

    turns = [name for name, _, _ in calls][3 * NUM_WARM_UP :: 2]
    firsts = Counter(turns[::3])
    assert min(firsts[name] for name in "abc") >= 10
    follows = Counter(pairwise(turns))
    assert min(follows[pair] for pair in permutations("abc", 2)) >= 15


def test_every_model_has_every_setting_and_the_asked_number_of_samples(calls, inputs):
    progress: list[tuple[int, int]] = []
    models = [_Recorder(name, calls) for name in "ab"]

    timings = benchmark.time_models(lambda _: models, inputs, [1, 3], [1, 2], 11, lambda *call: progress.append(call))

    assert [(t.batch_size, t.num_threads, t.model) for t in timings] == [
        (batch_size, threads, model) for threads in (1, 2) for batch_size in (1, 3) for model in (0, 1)
    ]
    assert all(len(timing.samples_ms) == 11 and min(timing.samples_ms) >= 0 for timing in timings)
    assert {call[1:] for call in calls} == {(1, 1), (1, 2), (3, 1), (3, 2)}
    assert progress == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_batch_larger_than_the_inputs_repeats_them(inputs):
    seen: list[Tensor] = []

    class Watcher(_Model):
        def forward(self, x):
            seen.append(x)
            return x

    benchmark.time_models(lambda _: [Watcher()], inputs, [10], [1], num_samples=10)

    assert seen[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_slow_model_stops_early_but_has_ten_samples(calls, inputs, monkeypatch):
    monkeypatch.setattr(benchmark, "_MAX_SECONDS", 0.0)

    timings = benchmark.time_models(
        lambda _: [_Recorder("a", calls), _Recorder("b", calls)], inputs, [1], [1], num_samples=1000
    )

    assert [len(timing.samples_ms) for timing in timings] == [10, 10]


def test_samples_are_milliseconds(inputs, monkeypatch):
    clock = iter(n * 0.25 for n in range(1000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))

    timings = benchmark.time_models(lambda _: [_Model()], inputs, [1], [1], num_samples=10)

    assert timings[0].samples_ms == (250.0,) * 10


@pytest.mark.parametrize("fails", [True, False])
def test_the_number_of_threads_is_put_back_also_after_an_error(inputs, fails):
    class Failing(_Model):
        def forward(self, x):
            if fails:
                raise RuntimeError("no kernel")
            return x

    before = torch.get_num_threads()
    if fails:
        with pytest.raises(RuntimeError, match="no kernel"):
            benchmark.time_models(lambda _: [Failing()], inputs, [1], [before + 1], num_samples=10)
    else:
        benchmark.time_models(lambda _: [Failing()], inputs, [1], [before + 1], num_samples=10)

    assert torch.get_num_threads() == before


def test_models_are_opened_once_for_each_number_of_threads_and_get_the_layout_they_like():
    opened: list[int] = []
    seen: list[bool] = []

    class Planar(_Model):
        def arrange(self, x):
            return x.contiguous()

        def forward(self, x):
            seen.append(x.is_contiguous())
            return x

    def open_models(threads):
        opened.append(threads)
        return [Planar()]

    benchmark.time_models(open_models, torch.zeros(2, 3, 4, 4), [1, 2], [1, 2], num_samples=10)

    assert opened == [1, 2]
    assert all(seen)


class _Clocked(_Model):
    """Takes the time that it is given, on a clock of its own."""

    now = 0.0

    def __init__(self, seconds):
        super().__init__()
        self.seconds = iter(seconds)

    def forward(self, x):
        _Clocked.now += next(self.seconds)
        return x


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: _Clocked.now)
    monkeypatch.setattr(benchmark, "_MAX_SECONDS", float("inf"))


def count_samples(models, inputs, batch_sizes=(1,), num_threads=(1,), files=None):
    timings = benchmark.time_models(lambda _: models, inputs, batch_sizes, num_threads, 100, files=files)
    return {(each.batch_size, each.num_threads): len(each.samples_ms) for each in timings}


def noisy(seconds, number):
    return (seconds * (1 + 0.04 * random.Random(f"{number}-{call}").random()) for call in count())


@pytest.mark.usefixtures("clock")
def test_timing_ends_when_the_order_is_certain(inputs):
    clear = count_samples([_Clocked(noisy(1.0, 0)), _Clocked(noisy(2.0, 1))], inputs)
    close = count_samples([_Clocked(noisy(1.0, 0)), _Clocked(noisy(1.02, 1))], inputs)

    assert 10 <= clear[1, 1] <= 15
    assert clear[1, 1] < close[1, 1] <= 100


@pytest.mark.usefixtures("clock")
def test_the_order_of_one_files_slower_runtimes_needs_no_samples(inputs):
    def models():
        return [_Clocked(noisy(ms, number)) for number, ms in enumerate((1.0, 2.0, 2.02))]

    assert count_samples(models(), inputs, files="aaa")[1, 1] < count_samples(models(), inputs, files="abc")[1, 1]


@pytest.mark.usefixtures("clock")
def test_settings_that_nothing_is_ranked_by_take_twenty_samples_and_slow_ones_two(inputs, monkeypatch):
    def count_with(most_seconds):
        monkeypatch.setattr(benchmark, "_MAX_SECONDS_REPORTED", most_seconds)
        models = [_Clocked(noisy(1.0, 0)), _Clocked(noisy(1.02, 1))]
        found = count_samples(models, inputs, [1, 2], [1, 2])
        return found.pop((1, 1)) > 20, set(found.values())

    assert count_with(float("inf")) == (True, {20})
    assert count_with(0.0) == (True, {2})


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("seconds", "untimed"), [(0.2, 0), (0.01, 20)])
def test_a_long_call_follows_no_untimed_one(inputs, seconds, untimed, monkeypatch):
    monkeypatch.setattr(benchmark, "_MAX_SECONDS_REPORTED", float("inf"))
    left = [seconds] * 100

    benchmark.time_models(lambda _: [_Clocked(iter(left.pop, None))], inputs, [2], [1], 100)

    assert 100 - len(left) == NUM_WARM_UP + 20 + untimed
