"""Stages that make float models: load_float, equalize, fuse."""

from dataclasses import dataclass
from typing import Literal

from quantlib.inputs import ModelInput, Selection
from quantlib.recipe import TrainingRecipe
from quantlib.store import Ref
from quantlib.transforms import Transform
from tasks.caching import stage
from tasks.run import current_run


@dataclass(frozen=True)
class Training:
    """What a model without weights is trained on."""

    images: Selection
    transform: Transform
    recipe: TrainingRecipe


@stage("load_float")
def load_float(model: ModelInput, num_classes: int, crop: int, seed: int, training: Training | None) -> Ref:
    """Build the float model, and fill it with its weights; or train it, where `training` is given."""
    from quantlib import data, models
    from quantlib import training as trainer

    run = current_run()
    module, header = models.from_input(model, num_classes, seed)
    models.check_logits(module, num_classes, crop)
    if training is not None:
        split, indices = data.select(training.images)
        trainer.train(module, split, indices, training.transform, training.recipe, seed, run.progress)
    return run.store.put("model", models.save(module, header))


@stage("equalize")
def equalize(model: Ref, crop: int) -> Ref:
    """Make channel ranges equal across layers; the float model computes the same."""
    from quantlib import equalization, models

    store = current_run().store
    module, header = models.load(store.read(model))
    return store.put("model", models.save(equalization.equalize(module, crop), header))


@stage("fuse-{branch}")
def fuse(model: Ref, mode: Literal["eval", "qat"], *, branch: str) -> Ref:
    """Fuse Conv, BatchNorm and ReLU: folded ("eval": baseline and PTQ), or kept live ("qat")."""
    from quantlib import fusion, models

    store = current_run().store
    module, header = models.load(store.read(model))
    return store.put("model", models.save(fusion.fuse_model(module, mode), header | {"fused": mode}))
