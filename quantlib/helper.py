"""A process that runs exported files, so that a native kernel that crashes or hangs takes nothing else along.

The first file starts it, which takes as long as importing torch; it then serves all others. Requests and answers are
lines of JSON: the paths of a file and of images in, logits out. It exits when its standard input is closed, as the
kernel does when the process that started it ends, however that ends.
"""

from __future__ import annotations

import atexit
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.data import shards
from quantlib.data.feeding import feed
from quantlib.errors import MachineError, ModelError, QuantflowError, reason_of
from quantlib.process import begin_to_answer, start_child
from quantlib.recipe.interface import FLOAT, Interface
from quantlib.runtimes import classifiers

NUM_CHECKED = 32
"""How many images a file must answer before it counts."""

# Opening a large model and running it on some images takes a minute.
_MAX_SECONDS = 600
# For one image: a runtime that takes longer is of no use.
_MAX_SECONDS_TIMED = 30
# What a kernel does to its own process. Any other signal came from outside and says nothing about the file.
_CRASHES = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}
_ERRORS = {error.__name__: error for error in (MachineError, ModelError)}


def start() -> None:
    """Start the helper ahead of the first file, so that it imports torch while this process works."""
    _HELPER.start()


def run_file(path: Path, runtime: str, shard: Path, num_images: int, interface: Interface = FLOAT) -> Tensor:
    """Answers of an exported file, [n, num_classes] float32, computed in the helper.

    Args:
        path: The file.
        runtime: As for `classifiers.open_model`.
        shard: A file of decoded images.
        num_images: How many of them to use: the first.
        interface: What the file takes and gives.

    Raises:
        ModelError: If the file cannot be read, does not run, crashes or hangs.
        MachineError: If this machine lacks the runtime or the engine, or the helper was ended from outside.
    """
    answer = _ask(path, runtime, shard, interface, _MAX_SECONDS, num_images=num_images)
    return torch.tensor(answer["logits"], dtype=torch.float32)


def time_file(path: Path, runtime: str, shard: Path, interface: Interface = FLOAT) -> float:
    """Seconds that an exported file takes for one image in the helper, once it is warm.

    Args:
        path: The file.
        runtime: As for `classifiers.open_model`.
        shard: A file of decoded images; the first one is used.
        interface: What the file takes and gives.

    Raises:
        ModelError: As for `run_file`; here it hangs after half a minute.
        MachineError: As for `run_file`.
    """
    return float(_ask(path, runtime, shard, interface, _MAX_SECONDS_TIMED, num_images=None)["seconds"])


def _ask(
    path: Path, runtime: str, shard: Path, interface: Interface, max_seconds: int, *, num_images: int | None
) -> dict[str, Any]:
    request = {
        "path": str(path.absolute()),
        "runtime": runtime,
        "shard": str(shard.absolute()),
        "num_images": num_images,
        "interface": asdict(interface),
        "max_seconds": max_seconds,
    }
    answer = _HELPER.ask(request)
    if isinstance(answer, int):
        raise _explain_death(answer, runtime, max_seconds)
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    return answer


class _Helper:
    """The helper as its parent sees it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def start(self) -> None:
        """Start it, unless it runs."""
        with self._turn:
            self._running()

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | int:
        """The helper's answer, or the exit status that it ended with instead, negative for a signal."""
        with self._turn:
            process = self._running()
            requests, answers = process.stdin, process.stdout
            assert requests is not None
            assert answers is not None
            try:
                requests.write(json.dumps(request) + "\n")
                requests.flush()
                line = answers.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:
                self.stop()  # Its answer would be taken for that to the next request.
                raise
            if line.endswith("\n"):
                return json.loads(line)
            process.communicate()
            self.process = None
            return process.returncode

    def stop(self) -> None:
        """Kill the helper, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _running(self) -> subprocess.Popen[str]:
        # It may have died since its last answer.
        if self.process is not None and self.process.poll() is not None:
            self.stop()
        if self.process is None:
            self.process = _start()
        return self.process


_HELPER = _Helper()
atexit.register(_HELPER.stop)


def _start() -> subprocess.Popen[str]:
    return start_child(
        "quantlib.helper",
        OMP_NUM_THREADS=str(torch.get_num_threads()),
        # TorchScript's interpreter prints warnings past Python's filters. What a file warns of is seen when it is
        # evaluated, too.
        TORCH_CPP_LOG_LEVEL="ERROR",
    )


def _explain_death(status: int, runtime: str, max_seconds: int) -> QuantflowError:
    if -status == signal.SIGALRM:
        what = f"gave no answer within {max_seconds} seconds"
    elif -status in _CRASHES:
        what = f"crashed with {signal.Signals(-status).name}"
    else:
        how = f"exit status {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
        return MachineError(
            f"The process that runs exported files ended with {how} in {runtime}. If memory ran out, free some; or "
            "leave the runtime out with benchmark.runtimes. Then run again: finished stages are kept."
        )
    return ModelError(
        f"The {_format(runtime)} file {what} in {runtime}. Try another engine or runtime, or leave layers in float "
        "(float_layers)."
    )


def _format(runtime: str) -> str:
    return {"torchscript": "TorchScript", "torch_export": "torch.export", "executorch": "ExecuTorch"}.get(
        runtime.partition("-")[0], "ONNX"
    )


# In the helper


def _serve() -> None:
    """Answer requests until the parent is gone."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # A crash is expected, and leaves no file in the working folder.
    answers = begin_to_answer()
    for line in sys.stdin:
        request = json.loads(line)
        # The kernel ends a file that hangs, even one that keeps Python from running.
        signal.alarm(request.pop("max_seconds"))
        answer = _answer(**request)
        signal.alarm(0)
        print(json.dumps(answer), file=answers, flush=True)


def _answer(path: str, runtime: str, shard: str, num_images: int | None, interface: dict[str, Any]) -> dict[str, Any]:
    """Logits for some images; or, if their number is None, the seconds that one takes."""
    try:
        found = shards.open_shard(Path(shard))
        images = feed(found.pixels[: num_images or 1], found.normalization, Interface(**interface))
        model = classifiers.open_model(Path(path), runtime)
        if num_images:
            return {"logits": model(images).tolist()}
        model(images)
        start = time.perf_counter()
        model(images)
        return {"seconds": time.perf_counter() - start}
    except (MachineError, ModelError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        message = f"The {_format(runtime)} file does not run in {runtime}: {reason_of(error)}"
        return {"error": "ModelError", "message": message}


if __name__ == "__main__":
    _serve()
