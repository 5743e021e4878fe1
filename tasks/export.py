"""Stages that export: script_and_save, try_file, draft_onnx, save_onnx, save_program."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from quantlib.errors import ModelError
from quantlib.recipe.interface import Interface
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.stage import Job, stage

_REFUSAL = "refusal"
# How much slower than where it was checked a file may be in another runtime; asked if an image takes so many seconds.
_MOST_TIMES, _NOTABLE_SECONDS = 10.0, 0.5
_Opened: TypeAlias = tuple[Any, Any, Any]
"""A model as a graph, its header, and its answers to some images: their types would import torch."""
_OPENED: dict[tuple[str, str], _Opened] = {}


@stage("script_and_save-{branch}")
def script_and_save(job: Job, model: Ref, runtime: Runtime, images: Ref, interface: Interface, *, branch: str) -> Ref:
    """The TorchScript file of a quantized model for an engine, or of a fused float model, once it answers as the model.

    Or why there is none.
    """
    from quantlib.data import shards
    from quantlib.export import check, scripting
    from quantlib.export.ends import Ends
    from quantlib.quantize import stored

    shard = job.store.path(images)
    ends = Ends(interface, shards.open_shard(shard).normalization)
    module, header, answers = _opened(job, model, images, stored.open_model, check.answers_of)

    def write() -> Ref:
        content = scripting.script(module, runtime.engine, header.input_shape, ends)
        check.check_file(content, module, runtime.name, shard, interface, answers)
        return job.store.put("torchscript", content)

    return _or_refusal(job, write)


@stage("try_file-{branch}")
def try_file(
    job: Job, file: Ref, images: Ref, checked_in: Runtime, runtime: Runtime, interface: Interface, *, branch: str
) -> Ref:
    """A file that was checked in one runtime, once it has run in another, too. Or why it does not, or is far too slow.

    onednn has a plain loop in place of a kernel for some layers: ViT-B/16 took minutes for 20 images, and would have
    taken ten to be timed.
    """
    from quantlib import helper

    path, shard = job.store.path(file), job.store.path(images)

    def run() -> Ref:
        seconds = helper.time_file(path, runtime.name, shard, interface)
        if seconds > _NOTABLE_SECONDS:
            usual = helper.time_file(path, checked_in.name, shard, interface)
            if seconds > _MOST_TIMES * usual:
                raise ModelError(
                    f"One image takes {seconds / usual:,.0f} times as long in {runtime.name} as in {checked_in.name}."
                )
        helper.run_file(path, runtime.name, shard, helper.NUM_CHECKED, interface)
        return file

    return _or_refusal(job, run)


@stage("draft_onnx")
def draft_onnx(job: Job, fused: Ref, exporter: str) -> Ref:  # The exporter's version is a part of the key.
    """The ONNX graph that the files of every variant are filled into; or why there is none."""
    from quantlib import helper
    from quantlib.export import onnx_draft
    from quantlib.quantize import stored

    helper.start()  # The files that are filled into this graph will be checked there; torch's exporter takes seconds.
    module, header = stored.open_model(job.store.read(fused))
    return _or_refusal(job, lambda: job.store.put("onnx-draft", onnx_draft.draft(module, header.input_shape)))


@stage("save_onnx-{branch}")
def save_onnx(
    job: Job, draft: Ref, model: Ref, images: Ref, runtime: Runtime, interface: Interface, *, branch: str
) -> Ref:
    """The ONNX file of a fused float model, or of a quantized model, once it answers in a runtime as the model does.

    Or why there is none: a model that ONNX cannot express, or that answers differently in a runtime, still has its
    other files.
    """
    from quantlib.data import shards
    from quantlib.export import check, onnx
    from quantlib.export.ends import Ends
    from quantlib.quantize import stored

    store, shard = job.store, job.store.path(images)
    if is_refusal(draft):
        return store.put_json(_REFUSAL, store.read_json(draft))
    module, _, answers = _opened(job, model, images, stored.open_model, check.answers_of)

    def write() -> Ref:
        plain = onnx.write_onnx(store.read(draft), module, runtime.name)
        content = Ends(interface, shards.open_shard(shard).normalization).add_to_onnx(plain)
        check.check_file(content, module, runtime.name, shard, interface, answers)
        return store.put("onnx", content)

    return _or_refusal(job, write)


@stage("save_program-{branch}")
def save_program(job: Job, model: Ref, images: Ref, runtime: Runtime, interface: Interface, *, branch: str) -> Ref:
    """The file for torch_export or executorch of a fused float model, or of a quantized model, once it answers as it.

    Or why there is none.
    """
    from quantlib.data import shards
    from quantlib.export import check, executorch, torch_export
    from quantlib.export.ends import Ends
    from quantlib.quantize import stored

    shard = job.store.path(images)
    ends = Ends(interface, shards.open_shard(shard).normalization)
    module, header = stored.open_model(job.store.read(model))
    writer = executorch.write if runtime.name == "executorch" else torch_export.write

    def write() -> Ref:
        content = writer(module, header.input_shape, ends)
        check.check_file(content, module, runtime.name, shard, interface)
        return job.store.put(runtime.name, content)

    return _or_refusal(job, write)


def _opened(
    job: Job,
    model: Ref,
    images: Ref,
    open_model: Callable[[bytes], tuple[Any, Any]],
    answers_of: Callable[[Any, Path], Any],
) -> _Opened:
    """A model, its header and its answers to images; the last ones are remembered, as a model has several files.

    Who writes a file must leave the model as it is. The functions are quantlib's: a stage imports them itself, so that
    their code is in its key.
    """
    key = model.sha256, images.sha256
    if key not in _OPENED:
        _OPENED.clear()  # Large models are kept once.
        module, header = open_model(job.store.read(model))
        _OPENED[key] = module, header, answers_of(module, job.store.path(images))
    return _OPENED[key]


def _or_refusal(job: Job, make: Callable[[], Ref]) -> Ref:
    """What `make` returns; or, if the model does not allow it, why: the run can do without one of its files."""
    try:
        return make()
    except ModelError as error:
        return job.store.put_json(_REFUSAL, {"reason": str(error)})


def is_refusal(file: Ref) -> bool:
    """Whether a stage found that there is no such file; False if the stage is only planned."""
    return isinstance(file, Ref) and file.kind == _REFUSAL
