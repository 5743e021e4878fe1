"""Stages that make float models: load_float, equalize, smooth, fuse."""

from dataclasses import dataclass, replace

from quantlib.data.split import Subset
from quantlib.data.transforms import Transform
from quantlib.models.source import ModelInput
from quantlib.recipe.scheme import FuseMode
from quantlib.recipe.sections import TrainingRecipe
from quantlib.store.artifacts import Ref
from tasks.stage import Job, stage


@dataclass(frozen=True)
class Training:
    """What a model without weights is trained on, and how."""

    images: Subset
    transform: Transform
    recipe: TrainingRecipe


@stage("load_float")
def load_float(
    job: Job,
    model: ModelInput,
    num_classes: int,
    input_shape: tuple[int, int, int],
    seed: int,
    training: Training | None,
) -> Ref:
    """Build the float model and load its weights, or train it if `training` is given."""
    from quantlib.data import loading
    from quantlib.graph.model import trace_model
    from quantlib.graph.tracing import is_whole
    from quantlib.models import checkpoint, registry
    from quantlib.models import training as trainer

    module, header = registry.from_input(model, num_classes, input_shape, seed)
    registry.check_logits(module, num_classes, input_shape)
    if training is not None:
        split, indices = loading.select(training.images)
        trainer.train(module, split, indices, training.transform, training.recipe, seed, job.progress)
    traced = trace_model(module, input_shape)
    header = replace(header, whole=is_whole(traced))
    return job.store.put(header.kind, checkpoint.save(traced, header))


@stage("equalize")
def equalize(job: Job, model: Ref) -> Ref:
    """Equalize channel ranges across layers; the float model's outputs stay the same."""
    from quantlib.models import checkpoint
    from quantlib.quantize import equalization, stored

    store = job.store
    module, header = stored.open_model(store.read(model))
    return store.put(header.kind, checkpoint.save(equalization.equalize(module, header.input_shape), header))


@stage("smooth-{branch}")
def smooth(job: Job, model: Ref, alpha: float, images: tuple[Ref, ...], *, branch: str) -> Ref:
    """Move a part of the ranges that channels have into the layers that read them; the outputs stay the same."""
    from quantlib.models import checkpoint
    from quantlib.quantize import calibration, equalization, stored

    store = job.store
    module, header = stored.open_model(store.read(model))
    x = calibration.first_images_of([store.path(ref) for ref in images])
    return store.put(header.kind, checkpoint.save(equalization.smooth(module, header.input_shape, alpha, x), header))


@stage("plan_layers-{branch}")
def plan_layers(job: Job, fused: Ref, float_layers: tuple[str, ...], *, branch: str) -> Ref:
    """What becomes int8 of a model fused for PTQ, layer by layer, and what of that may be faster in float."""
    from quantlib.graph.plan import draw_plan, share_of_int8
    from quantlib.graph.regions import costly_layers, find_regions
    from quantlib.quantize import preparation, stored

    module, _ = stored.open_model(job.store.read(fused))
    plan = draw_plan(module, preparation.find_layers(module, float_layers))
    costly = costly_layers(find_regions(module, plan))
    content = {"int8_share": share_of_int8(plan.layers), "layers": plan.layers, "costly_layers": costly}
    return job.store.put_json("plan", content)


@stage("fuse-{branch}")
def fuse(job: Job, model: Ref, mode: FuseMode, *, branch: str) -> Ref:
    """Fuse Conv, BatchNorm and ReLU: folded ("eval": baseline and PTQ), or kept live ("qat")."""
    from quantlib.graph import fusion
    from quantlib.models import checkpoint
    from quantlib.quantize import stored

    store = job.store
    module, before = stored.open_model(store.read(model))
    header = replace(before, fused=mode)
    return store.put(header.kind, checkpoint.save(fusion.fuse_model(module, mode, inplace=True), header))
