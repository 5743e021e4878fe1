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
class FileRefs:
    """A file in a runtime, with its answers there."""

    file: Ref
    runtime: Runtime
    validation: tuple[Ref, ...] = ()
    selection: tuple[Ref, ...] = ()
    out_of: int | None = None
    """How many validation images there are, if evaluation ends once the verdict is certain; None: it sees them all."""


@dataclass(frozen=True, kw_only=True)
class CandidateRefs:
    """The artifacts of an int8 model that QAT may choose."""

    model: Ref
    reference: FileRefs
    """The file that it is judged by."""


@dataclass(frozen=True, kw_only=True)
class EpochRefs(CandidateRefs):
    """The artifacts of one epoch of QAT."""

    metrics: Ref


@dataclass(frozen=True, kw_only=True)
class VariantRefs:
    """The artifacts of a variant."""

    variant: Variant
    reference: FileRefs
    """The file that choices are made by: the first that there is, of those that may be shipped if one is. Answers are
    there if a choice took them."""
    saved: tuple[tuple[Runtime, Ref], ...]
    """For each runtime its file, or why there is none; for TorchScript on one engine."""
    engines: tuple[tuple[Runtime, Ref], ...] = ()
    """For each other engine of this machine the TorchScript file, or why it does not run there; empty for float."""
    files: tuple[FileRefs, ...] = ()
    """The files that may be shipped, once that is known, each in its fastest runtime; empty if no file runs in an
    allowed runtime."""
    simulated: dict[str, tuple[Ref, ...]] = field(default_factory=dict)
    layers: tuple[Ref, ...] = ()
    start: CandidateRefs | None = None
    """The calibrated model that QAT started from, if it did."""
    epochs: tuple[EpochRefs, ...] = ()
    best_epoch: int | None = None
    """Index of the chosen epoch in `epochs`; None: the start, or not QAT."""
    model: Ref | None = None
    """The quantized model; None: float."""
    plan: Ref | None = None
    """What of it is int8; None: float."""

    @property
    def runtimes(self) -> dict[Ref, list[Runtime]]:
        """The runtimes of each file that there is; in a plan, that there may be."""
        found: dict[Ref, list[Runtime]] = {}
        for runtime, file in (*self.saved, *self.engines):
            if not is_refusal(file):
                found.setdefault(file, []).append(runtime)
        return found


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
