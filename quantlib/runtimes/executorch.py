"""ExecuTorch's packages, imported so that they write nothing to the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is written to standard error inside the block: ExecuTorch logs there, also where nothing is wrong."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def load_method(path: str, num_threads: int) -> Any:
    """The method `forward` of a program.

    Args:
        path: The file.
        num_threads: Threads of this process's programs; 0: as they are.
    """
    with quiet():
        runtime, threads = (
            import_module(f"executorch.{name}") for name in ("runtime", "extension.pybindings.portable_lib")
        )
        if num_threads and num_threads != threads._threadpool_get_thread_count():
            threads._unsafe_reset_threadpool(num_threads)
        return runtime.Runtime.get().load_program(path).load_method("forward")
