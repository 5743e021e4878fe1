"""The runtimes and int8 engines of this machine, by name. Importable without torch."""

import importlib.metadata
import importlib.util
import platform
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantlib import machine
from quantlib.errors import MachineError
from quantlib.recipe.scheme import ActivationBits

_FOR_ONNX = ("openvino", "onnxruntime")
# Those by which kernels for int8, or for the float layers between them, are chosen.
_INSTRUCTIONS = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve"}


def instructions() -> str:
    """The CPU's instructions on which int8 results depend; "" if the system does not say."""
    with suppress(OSError):
        return " ".join(sorted(_INSTRUCTIONS & set(Path("/proc/cpuinfo").read_text().split())))
    return ""


def activation_bits(engine: str) -> ActivationBits:
    """How many bits of activations this CPU's int8 arithmetic takes without saturating.

    Without VNNI, x86 adds pairs of products in 16 bits: 2 * 255 * 127 does not fit, 2 * 127 * 127 does. qnnpack adds
    in 32 bits.
    """
    return _activation_bits(engine, instructions())


def _activation_bits(engine: str, cpu: str) -> ActivationBits:
    return 8 if engine == "qnnpack" or "vnni" in cpu else 7


@dataclass(frozen=True)
class Runtime:
    """A runtime, which runs exported models."""

    name: str
    """torchscript, torchscript-ENGINE, onnxruntime, openvino, executorch or torch_export."""
    version: str
    instructions: str = ""
    """Those of the CPU that it runs on, as far as its results depend on them."""

    @property
    def kind(self) -> str:
        """The name without the engine."""
        return self.name.partition("-")[0]

    @property
    def suffix(self) -> str:
        """How the names of its files end."""
        return suffix_of(self.name)

    @property
    def engine(self) -> str | None:
        """The int8 engine of torch; None: float, or a runtime of its own."""
        return self.name.partition("-")[2] or None


@dataclass(frozen=True)
class Machine:
    """What the results of stages depend on of the machine that they run on."""

    name: str
    cpu_model: str
    instructions: str
    """Those of the CPU on which int8 results depend."""
    engines: tuple[str, ...]
    """The int8 engines of torch for this kind of CPU, the one that torch itself prefers first."""
    torch: str
    """torch's version."""
    runtimes: tuple[Runtime, ...]
    """The installed runtimes besides TorchScript, the usually faster ones first."""
    exporter: str
    """The packages that write ONNX files, with their versions; "" if one is missing."""

    def engine(self, name: str) -> str:
        """The int8 engine that a recipe's `engine` stands for. Whether torch has it is found out where it is used."""
        return self.engines[0] if name == "auto" else name

    def activation_bits(self, engine: str) -> ActivationBits:
        """How many bits of activations the int8 arithmetic of its CPU takes without saturating."""
        return _activation_bits(engine, self.instructions)

    def torch_runtime(self, engine: str | None) -> Runtime:
        """TorchScript with int8 on an engine; None: float."""
        return Runtime(torchscript_on(engine), self.torch, self.instructions)

    def find_runtimes(
        self, wanted: Collection[str] | None = None, shipped_for: Collection[str] | None = None
    ) -> tuple[Runtime, ...]:
        """The runtimes besides TorchScript that a run uses.

        Args:
            wanted: `benchmark.runtimes`: names of those that must be installed, apart from torchscript.
            shipped_for: `gate.runtimes`: likewise. Without both, any for ONNX.

        Raises:
            MachineError: If one of them is not installed.
        """
        return _choose(self.runtimes, wanted, shipped_for, f" on {self.name}")

    def has(self, runtime: Runtime) -> bool:
        """Whether a file runs here as it does in this runtime; whether torch has the engine is found out then."""
        if runtime.kind == "torchscript":
            return (runtime.version, runtime.instructions) == (self.torch, self.instructions)
        return runtime in self.runtimes


def this_machine() -> Machine:
    """This one."""
    return Machine(
        name=socket.gethostname(),
        cpu_model=machine.cpu_model(),
        instructions=instructions(),
        engines=engines(),
        torch=importlib.metadata.version("torch"),
        runtimes=_installed_runtimes(),
        exporter=exporter(),
    )


def package_of(runtime: str) -> str:
    """The package that runs the files of a runtime."""
    return {"torchscript": "torch", "torch_export": "torch"}.get(runtime.partition("-")[0], runtime)


def is_installed(runtime: str) -> bool:
    """Whether this machine has the package that runs the files of a runtime."""
    return importlib.util.find_spec(package_of(runtime)) is not None


def suffix_of(runtime: str) -> str:
    """How the names of a runtime's files end: .pt, .pt2, .pte or .onnx."""
    return {"torchscript": ".pt", "torch_export": ".pt2", "executorch": ".pte"}.get(runtime.partition("-")[0], ".onnx")


def find_runtimes(
    wanted: Collection[str] | None = None, shipped_for: Collection[str] | None = None
) -> tuple[Runtime, ...]:
    """The installed runtimes besides TorchScript, the usually faster ones first.

    Those for ONNX files, of which there are none without the packages `onnx` and `onnxscript`, which write them;
    executorch and torch_export only if they are named.

    Args:
        wanted: `benchmark.runtimes`: names of those that must be installed, apart from torchscript.
        shipped_for: `gate.runtimes`: likewise. Without both, any for ONNX.

    Raises:
        MachineError: If one of them is not installed.
    """
    return _choose(_installed_runtimes(), wanted, shipped_for, "")


def _installed_runtimes() -> tuple[Runtime, ...]:
    names = [name for name in (*_FOR_ONNX, "executorch", "torch_export") if is_installed(name)]
    if not exporter():
        names = [name for name in names if name not in _FOR_ONNX]
    cpu = instructions()
    return tuple(Runtime(name, importlib.metadata.version(package_of(name)), cpu) for name in names)


def _choose(
    installed: tuple[Runtime, ...], wanted: Collection[str] | None, shipped_for: Collection[str] | None, where: str
) -> tuple[Runtime, ...]:
    for key, names in (("benchmark.runtimes", wanted), ("gate.runtimes", shipped_for)):
        missing = sorted(set(names or ()) - {"torchscript", *(runtime.name for runtime in installed)})
        if missing:
            raise MachineError(
                f"{key} names {missing[0]}, which is not installed{where}: pip install 'quantflow[{missing[0]}]', or "
                "leave it out."
            )
    chosen = next((names for names in (wanted, shipped_for) if names is not None), _FOR_ONNX)
    return tuple(runtime for runtime in installed if runtime.name in chosen)


def exporter() -> str:
    """The packages that write ONNX files, with their versions; "" if one is missing."""
    names = ("onnx", "onnxscript")
    if any(importlib.util.find_spec(name) is None for name in names):
        return ""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def torch_runtime(engine: str | None) -> Runtime:
    """TorchScript with int8 on an engine; None: float."""
    return Runtime(torchscript_on(engine), importlib.metadata.version("torch"), instructions())


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
