"""The runtimes and int8 engines of this machine, by name. Importable without torch."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantlib.errors import MachineError
from quantlib.recipe.scheme import ActivationBits


def activation_bits(engine: str) -> ActivationBits:
    """How many bits of activations this CPU's int8 arithmetic takes without saturating.

    Without VNNI, x86 adds pairs of products in 16 bits: 2 * 255 * 127 does not fit, 2 * 127 * 127 does. qnnpack adds
    in 32 bits.
    """
    if engine == "qnnpack":
        return 8
    with suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        if flags & {"avx512_vnni", "avx_vnni"}:
            return 8
    return 7


@dataclass(frozen=True)
class Runtime:
    """A runtime, which runs exported models."""

    name: str
    """torchscript, torchscript-ENGINE, onnxruntime or openvino."""
    version: str

    @property
    def kind(self) -> str:
        """torchscript, onnxruntime or openvino."""
        return self.name.partition("-")[0]


def find_onnx_runtimes(
    wanted: Collection[str] | None = None, shipped_for: Collection[str] | None = None
) -> tuple[Runtime, ...]:
    """The installed runtimes for ONNX files, the usually faster one first.

    Empty without the packages `onnx` and `onnxscript`, which write the files.

    Args:
        wanted: `benchmark.runtimes`: names of those that must be installed, apart from torchscript; None: any will do.
        shipped_for: `gate.runtimes`: these must be installed, too.

    Raises:
        MachineError: If one of them is not installed.
    """
    installed = [name for name in ("openvino", "onnxruntime") if importlib.util.find_spec(name) is not None]
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        installed = []
    for key, names in (("benchmark.runtimes", wanted), ("gate.runtimes", shipped_for)):
        missing = sorted(set(names or ()) - {"torchscript", *installed})
        if missing:
            raise MachineError(
                f"{key} names {missing[0]}, which is not installed: pip install 'quantflow[{missing[0]}]', or leave it "
                "out."
            )
    return tuple(
        Runtime(name, importlib.metadata.version(name)) for name in installed if wanted is None or name in wanted
    )


def exporter() -> str:
    """The packages that write ONNX files, with their versions."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxscript"))


def torch_runtime(engine: str | None) -> Runtime:
    """TorchScript with int8 on an engine; None: float."""
    return Runtime(torchscript_on(engine), importlib.metadata.version("torch"))


def torchscript_on(engine: str | None) -> str:
    """The name of the runtime that is TorchScript with int8 on an engine; None: float."""
    return "torchscript" if engine is None else f"torchscript-{engine}"


def engines() -> tuple[str, ...]:
    """The int8 engines of torch for this kind of CPU, the one that torch itself prefers first."""
    return ("x86", "fbgemm", "onednn") if platform.machine().lower() in {"x86_64", "amd64"} else ("qnnpack", "onednn")


def default_engine() -> str:
    """The int8 engine that torch itself prefers on this kind of CPU."""
    return engines()[0]


def find_engine(name: str) -> str:
    """The engine that a recipe's `engine` stands for on this machine.

    Raises:
        MachineError: If this machine lacks it.
    """
    if name in {"auto", default_engine()}:
        return default_engine()
    # Importing torch takes seconds, and is not needed for the engine that it always has.
    return resolve_engine(name)


def resolve_engine(name: str) -> str:
    """The engine that `name` stands for on this machine.

    Raises:
        MachineError: If this CPU, or this build of torch, lacks it.
    """
    engine = default_engine() if name == "auto" else name
    import torch

    supported = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if engine not in supported:
        raise MachineError(
            f"Engine {engine!r} is not available: this machine's torch has {', '.join(supported)}. "
            "Set `engine` in the recipe to one of these, or to auto."
        )
    return engine
