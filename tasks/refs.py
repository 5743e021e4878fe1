"""References between stages: the artifacts that make up a variant."""

from dataclasses import dataclass, field

from quantlib.data.split import Subset
from quantlib.recipe.variant import Variant
from quantlib.report.rows import NoteRow
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.export import is_refusal


@dataclass(frozen=True)
class BenchmarkTarget:
    """A variant's file in a runtime."""

    artifact: Ref
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class CandidateRefs:
    """The artifacts of an int8 model that QAT may choose."""

    model: Ref
    artifact: Ref
    """Its TorchScript file."""
    validation: tuple[Ref, ...]
    selection: tuple[Ref, ...]


@dataclass(frozen=True, kw_only=True)
class EpochRefs(CandidateRefs):
    """The artifacts of one epoch of QAT."""

    metrics: Ref


@dataclass(frozen=True, kw_only=True)
class FileRefs:
    """A file in its fastest runtime, with its answers there."""

    file: Ref
    runtime: Runtime
    validation: tuple[Ref, ...]
    selection: tuple[Ref, ...]


@dataclass(frozen=True, kw_only=True)
class VariantRefs:
    """The artifacts of a variant."""

    variant: Variant
    artifact: Ref
    validation: tuple[Ref, ...]
    """Answers of `artifact` on its own engine; empty for QAT in a plan that cannot know the chosen epoch."""
    selection: tuple[Ref, ...]
    onnx: Ref | None = None
    """The ONNX file, or why there is none; None if no runtime for it is installed."""
    files: tuple[FileRefs, ...] = ()
    """The files that may be shipped, once that is known; empty if no file runs in an allowed runtime."""
    simulated: dict[str, tuple[Ref, ...]] = field(default_factory=dict)
    layers: tuple[Ref, ...] = ()
    start: CandidateRefs | None = None
    """The calibrated model that QAT started from, if it did."""
    epochs: tuple[EpochRefs, ...] = ()
    best_epoch: int | None = None
    """Index of the chosen epoch in `epochs`; None: the start, or not QAT."""
    prepared: Ref | None = None
    """The model that was converted: a calibrated model, or an epoch's state; None: float."""

    @property
    def onnx_file(self) -> Ref | None:
        """The ONNX file, if there is one; in a plan, if there may be one."""
        return None if self.onnx is None or is_refusal(self.onnx) else self.onnx


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything that a run has measured."""

    variants: tuple[VariantRefs, ...]
    targets: tuple[BenchmarkTarget, ...]
    """What was timed."""
    timings: Ref
    validation: Subset
    """What every variant was evaluated on."""
    pictures: Ref | None
    """Example images, if the recipe asks for any."""
    notes: tuple[NoteRow, ...]
    """Remarks on the run, for the report."""
    search_best: str | None = None
    """The variant that the search ended with."""
