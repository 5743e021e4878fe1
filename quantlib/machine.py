"""The machine a run computes on: its memory allocator and its name in reports."""

import ctypes
import platform
from contextlib import suppress
from pathlib import Path

from quantlib.scheme import ActivationBits

# glibc's parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for the next tensor; elsewhere do nothing.

    By default every large tensor's pages go back to the kernel and are faulted in again, which costs more than
    the arithmetic: MobileNetV2 at 224 px in batches of 50 ran five times faster with this.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 256 << 20)


def cpu_model() -> str:
    """The CPU's name, as the report gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def default_engine() -> str:
    """The int8 engine that torch itself prefers on this kind of CPU."""
    return "x86" if platform.machine().lower() in {"x86_64", "amd64"} else "qnnpack"


def find_engine(name: str) -> str:
    """The engine that a recipe's `engine` stands for on this machine.

    Raises:
        MachineError: If this machine lacks it.
    """
    if name in {"auto", default_engine()}:
        return default_engine()
    # Importing torch takes seconds, and is not needed for the engine that it surely has.
    from quantlib import backend

    return backend.resolve_engine(name)
