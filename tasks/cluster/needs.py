"""What a stage needs of a machine besides its inputs from the store: files, runtimes, a kind of CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.data.split import SplitInput
from quantlib.models.source import ModelInput
from quantlib.recipe.sections import is_weights_file
from quantlib.runtimes.available import Machine, Runtime
from tasks.stage import find_inside


@dataclass(frozen=True)
class Needs:
    """What a stage needs of a machine."""

    paths: tuple[str, ...]
    """Files and folders outside the store: the dataset, the weights, an exported model."""
    runtimes: tuple[Runtime, ...]
    exporter: str | None
    """The packages that write ONNX files, with their versions; None: none."""
    cpu: str | None
    """The CPU's model; None: any."""

    def lacking(self, machine: Machine) -> str:
        """What a machine lacks, as the end of a sentence; "" if it lacks nothing. Paths are looked for on the spot."""
        missing = [runtime for runtime in self.runtimes if not machine.has(runtime)]
        if missing:
            return f"{missing[0].name} {missing[0].version} on a CPU with {missing[0].instructions or 'no extensions'}"
        if self.exporter not in {None, machine.exporter}:
            return str(self.exporter)
        return "" if self.cpu in {None, machine.cpu_model} else f"the CPU {self.cpu}"


def find_needs(arguments: Mapping[str, Any]) -> Needs:
    """What a stage needs for these arguments."""
    models = list(find_inside(arguments, ModelInput))
    paths = [split.root for split in find_inside(arguments, SplitInput)]
    paths += [model.file for model in models]
    paths += [model.weights for model in models if model.weights and is_weights_file(model.weights)]
    return Needs(
        paths=tuple(dict.fromkeys(path for path in paths if path)),
        runtimes=tuple(dict.fromkeys(find_inside(arguments, Runtime))),
        exporter=arguments.get("exporter"),
        cpu=arguments.get("cpu"),
    )
