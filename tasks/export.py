"""The stage that exports: script_and_save."""

from quantlib.store import Ref
from tasks.caching import stage
from tasks.run import current_run


@stage("script_and_save-{branch}")
def script_and_save(model: Ref, *, branch: str) -> Ref:
    """The TorchScript file of a fused float model, or of an int8 model."""
    from quantlib import conversion, export

    store = current_run().store
    return store.put("torchscript", export.script(*conversion.load_deployable(store.read(model))))
