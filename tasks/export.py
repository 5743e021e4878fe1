"""Stages that export: script_and_save, save_onnx."""

from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.stage import Job, stage

_REFUSAL = "refusal"


@stage("script_and_save-{branch}")
def script_and_save(job: Job, model: Ref, *, branch: str) -> Ref:
    """The TorchScript file of a fused float model, or of an int8 model."""
    from quantlib.export import scripting
    from quantlib.quantize import stored

    store = job.store
    module, header = stored.open_model(store.read(model))
    return store.put("torchscript", scripting.script(module, header.engine))


@stage("save_onnx-{branch}")
def save_onnx(
    job: Job,
    model: Ref,
    artifact: Ref,
    images: Ref,
    runtime: Runtime,
    *,
    branch: str,
) -> Ref:
    """The ONNX file of a fused float model, or of an int8 model, once it answers as its TorchScript file does.

    Or why there is none: a model that ONNX cannot express, or that answers differently in an ONNX runtime, still has
    its TorchScript file.
    """
    from quantlib.errors import ModelError
    from quantlib.export import onnx
    from quantlib.quantize import stored

    store = job.store
    module, header = stored.open_model(store.read(model))
    try:
        content = onnx.to_onnx(module, header.input_shape)
        onnx.check_onnx(content, store.path(artifact), header.engine, runtime.name, store.path(images))
    except ModelError as error:
        return store.put_json(_REFUSAL, {"reason": str(error)})
    return store.put("onnx", content)


def is_refusal(file: Ref) -> bool:
    """Whether `save_onnx` found that there is no ONNX file; False if the stage is only planned."""
    return isinstance(file, Ref) and file.kind == _REFUSAL
