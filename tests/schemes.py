"""The schemes that named qconfigs stand for, on a CPU whose int8 arithmetic does not saturate."""

from quantlib.recipe.branches import PTQRecipe
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.scheme import Scheme

SCHEDULE = Schedule(
    batches_per_epoch=2,
    batch_size=6,
    epochs=None,
    learning_rate=0.01,
    decay="constant",
    freeze_batch_norm_after_epoch=0,
    freeze_observer_after_epoch=1,
    seed=7,
)
"""Two short steps per epoch; BatchNorm is frozen after the second, observers after the third."""


def scheme(qconfig: str) -> Scheme:
    """The scheme of a branch that sets only this qconfig."""
    return PTQRecipe(name="test", qconfig=qconfig).scheme(8)
