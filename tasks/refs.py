"""References between stages: which artifacts a variant is made of."""

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
    """The artifacts of an int8 model that QAT may end with."""

    artifact: Ref
    validation: tuple[Ref, ...]
    selection: tuple[Ref, ...]


@dataclass(frozen=True, kw_only=True)
class EpochRefs(CandidateRefs):
    """The artifacts of an epoch."""

    metrics: Ref


@dataclass(frozen=True, kw_only=True)
class FileRefs:
    """A file in the runtime that it is fastest in, with its answers there."""

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
    """Answers of `artifact` on its own engine; of QAT in a plan that cannot know which epoch is chosen, none."""
    selection: tuple[Ref, ...]
    onnx: Ref | None = None
    """The ONNX file, or why there is none; None where no runtime for it is installed."""
    files: tuple[FileRefs, ...] = ()
    """What may be shipped of it, once that is known; empty where no file of it is for a runtime that is allowed."""
    simulated: dict[str, tuple[Ref, ...]] = field(default_factory=dict)
    layers: tuple[Ref, ...] = ()
    start: CandidateRefs | None = None
    """The calibrated model that QAT started from, if it did."""
    epochs: tuple[EpochRefs, ...] = ()
    best_epoch: int | None = None
    """The place among `epochs` of the one that this is; None: the start, or not QAT."""
    prepared: Ref | None = None
    """What was converted: a calibrated model, or an epoch's state; None: float."""

    @property
    def onnx_file(self) -> Ref | None:
        """The ONNX file, where there is one; of a run that is only planned, where there may be."""
        return None if self.onnx is None or is_refusal(self.onnx) else self.onnx


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What a run has found."""

    variants: tuple[VariantRefs, ...]
    targets: tuple[BenchmarkTarget, ...]
    """What was timed."""
    timings: Ref
    validation: Subset
    """What every variant was evaluated on."""
    pictures: Ref | None
    """Example images, where any are asked for."""
    notes: tuple[NoteRow, ...]
    """What is to be said of the run."""
    search_best: str | None = None
    """The variant that the search ended with."""
