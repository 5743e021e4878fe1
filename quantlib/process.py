"""Processes that compute: their settings, and those that answer requests of the process that started them."""

import gc
import os
import select
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import TextIO

from quantlib import machine

EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # TorchScript and its int8 kernels are announced for removal; torch is pinned below the release that drops them.
    ("`torch.jit.(script|save|load|trace|trace_method|freeze|optimize_for_inference)` is deprecated", FutureWarning),
    ("torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning),
    # TorchScript finds an annotation that it does not know in torch's own GraphModule.
    ("The TorchScript type system doesn't support instance-level annotations", UserWarning),
    # ExecuTorch reads its own files in an old way, and calls its Python interface experimental.
    ("(read_text|open_text|read_binary) is deprecated", DeprecationWarning),
    ("This API is experimental and subject to change without notice", DeprecationWarning),
)
"""Warnings that are known to be given here: start of the message, and category. pyproject.toml lists the same."""


def prepare_process() -> None:
    """Set the process up to compute."""
    machine.keep_freed_memory()
    for message, category in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # A model consists of many thousands of objects that live for a stage: collecting garbage after every few hundred
    # new ones took a fifth of the time of converting and scripting.
    gc.set_threshold(20_000)


def start_child(module: str, *, keep_log: bool = False, **variables: str) -> subprocess.Popen[str]:
    """Start one of our own modules as a process that answers lines of JSON with lines of JSON.

    Args:
        module: Dotted name; it calls `begin_to_answer`.
        keep_log: Make its standard error a pipe; otherwise it is this process's.
        variables: Added to the environment.
    """
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    # -P: a module of the user's in the working folder is not one of Python's.
    return subprocess.Popen(  # noqa: S603 (our own module)
        [sys.executable, "-P", "-m", module],
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if keep_log else None,
        text=True,
        process_group=0,  # Ctrl-C is for the parent, which decides.
    )


def begin_to_answer() -> TextIO:
    """In a child: exit when the parent is gone; return the file that answers are written to."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare_process()
    return answers


def _exit_with_parent() -> None:
    # The kernel closes the other end when the parent ends, however that ends.
    hung_up = select.poll()
    hung_up.register(0, 0)
    hung_up.poll()
    os._exit(0)
