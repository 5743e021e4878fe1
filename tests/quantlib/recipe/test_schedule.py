"""When quantization-aware training freezes what."""

import pytest

from quantlib.recipe.schedule import Schedule


def _schedule(batch_norm, observer):
    return Schedule(
        batches_per_epoch=None,
        batch_size=2,
        epochs=None,
        learning_rate=0.1,
        decay="constant",
        freeze_batch_norm_after_epoch=batch_norm,
        freeze_observer_after_epoch=observer,
        seed=0,
    )


def test_freezes_follow_the_tutorials_rule():
    schedule = _schedule(batch_norm=2, observer=3)

    # `if nepoch > 3: disable_observer`, `if nepoch > 2: freeze_bn_stats`, at the end of each 0-based epoch.
    assert [schedule.freezes_batch_norm(epoch) for epoch in range(6)] == [False, False, False, True, True, True]
    assert [schedule.freezes_observers(epoch) for epoch in range(6)] == [False, False, False, False, True, True]


@pytest.mark.parametrize("epoch", [0, 1])
def test_minus_one_freezes_from_the_first_epoch_on(epoch):
    schedule = _schedule(batch_norm=-1, observer=-1)

    assert schedule.freezes_batch_norm(epoch)
    assert schedule.freezes_observers(epoch)
    assert not schedule.freezes_batch_norm(-1)  # before the first epoch
