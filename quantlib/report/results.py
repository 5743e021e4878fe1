"""The results of a run: its rows of every table, and what follows from all of them."""

from dataclasses import dataclass

from quantlib.export.bundle import Preprocessing
from quantlib.measure.examples import Example
from quantlib.report.layers import LayerRow
from quantlib.report.rows import ClassRow, EpochRow, FileRow, LatencyRow, NoteRow, StageRow, VariantRow, points


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a run."""

    run_id: str
    variants: tuple[VariantRow, ...]
    epochs: tuple[EpochRow, ...]
    latency: tuple[LatencyRow, ...]
    stages: tuple[StageRow, ...]
    classes: tuple[ClassRow, ...] = ()
    """Empty in runs reported before it was added, like the next one."""
    examples: tuple[Example, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    """Empty if the recipe does not ask for them."""
    files: tuple[FileRow, ...] = ()
    """Files of the quantized variants."""
    preprocessing: tuple[Preprocessing, ...] = ()
    """How an image becomes the models' input: one row; none in runs reported before it was added."""
    notes: tuple[NoteRow, ...] = ()
    """What to know about the run that no other table says."""

    @property
    def winner(self) -> VariantRow | None:
        """The model to ship, if one is inside the gate."""
        return next((row for row in self.variants if row.winner), None)

    @property
    def warnings(self) -> list[str]:
        """Why the figures may mislead, one sentence each."""
        return [note.text for note in self.notes if note.kind == "warning"]

    @property
    def regression(self) -> str | None:
        """What got worse since the run before, in one sentence, if the recipe asks for it and something did."""
        return next((note.text for note in self.notes if note.kind == "regression"), None)

    @property
    def remarks(self) -> list[str]:
        """What else to know about the run and single variants, one sentence each."""
        kept = [
            f"{row.variant}: no epoch of training was better than the model it started from, "
            f"so that is what was kept ({row.top1:.2%})."
            for row in self.variants
            if row.kept_start
        ]
        undecided = [
            f"{row.variant}: {row.num_images:,} images are too few to tell"
            + ("." if row.num_images_to_decide is None else f"; about {row.num_images_to_decide:,} would be enough.")
            for row in self.variants
            if row.gate == "undecided"
        ]
        shares: dict[float, list[str]] = {}
        for row in self.variants:
            if row.int8_share is not None:
                shares.setdefault(row.int8_share, []).append(row.variant)
        int8 = [
            f"{share:.1%} of the multiply-adds{' of ' + ', '.join(names) if len(shares) > 1 else ''} are int8."
            for share, names in shares.items()
        ]
        early = [
            f"{row.variant} after {row.num_images:,} ({points(-row.certain_high)} to {points(-row.certain_low)} points)"
            for row in self.variants
            if row.certain_low is not None and row.certain_high is not None
        ]
        available = max((row.num_images_available or 0 for row in self.variants), default=0)
        stopped = [f"Of {available:,} images, as many were evaluated as the verdict took: {', '.join(early)}."]
        slower = [
            f"{row.variant}: accurate enough, but {row.speedup:.2f}x as fast as float; "
            "gate.min_speedup = 0 would ship it for its size alone."
            for row in self.variants
            if row.gate == "slower"
        ]
        return [
            *(note.text for note in self.notes if note.kind == "note"),
            *int8,
            *kept,
            *undecided,
            *slower,
            *(stopped if early else []),
        ]

    @property
    def best(self) -> VariantRow:
        """The winner or, if there is none, the quantized model that loses least."""
        quantized = [row for row in self.variants if row.method != "float"]
        return self.winner or max(quantized, key=lambda row: row.top1_selection)
