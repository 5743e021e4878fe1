"""The verdict on each variant's files, the rows that report it, and which file to ship for which runtime.

A verdict is about a file in a runtime: runtimes round in different places, so the same file has a different
accuracy, and a different speed, in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from quantlib.measure import significance
from quantlib.measure.ranking import SETTING
from quantlib.recipe.sections import GateRecipe
from quantlib.report.choice import Contender, choose, describe_lead
from quantlib.report.gate import certain_interval, find_drop, is_inside, judge_drop
from quantlib.report.measured import File, Measured
from quantlib.report.rows import FileRow, VariantRow


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What the rows of a run have in common."""

    recipe: str
    selected_on: str
    torch_version: str
    cpu_model: str
    created_at: datetime


@dataclass(frozen=True)
class Verdict:
    """Every file judged, one chosen for each variant, and the one to ship."""

    _files: tuple["_Entry", ...]
    _chosen: tuple["_Entry", ...]
    """One per variant; float's is the first."""
    _winner: "_Entry | None"
    _reason: str | None

    @property
    def lead(self) -> str:
        """How certain the order of the fastest files is, float's among them; "" if nothing is inside the gate."""
        inside = [entry for entry in self._files if entry.accepted and entry.measured is not entry.baseline]
        return describe_lead([entry.contender for entry in (self._chosen[0], *inside)]) if inside else ""

    @property
    def reported(self) -> tuple[File, ...]:
        """The file that each variant's row is about."""
        return tuple(entry.file for entry in self._chosen)

    def variant_rows(self, run_info: RunInfo) -> tuple[VariantRow, ...]:
        """A row for each variant."""
        float_ms, compared = self._chosen[0].p50_ms, [entry for entry in self._chosen[1:] if entry.accepted]
        return tuple(
            entry.variant_row(
                run_info,
                float_ms=float_ms,
                reason=self._reason if entry is self._winner else None,
                pareto=not any(entry.contender.is_beaten_by(other.contender) for other in compared)
                if entry in compared
                else None,
            )
            for entry in self._chosen
        )

    def file_rows(self) -> tuple[FileRow, ...]:
        """A row for each file that may be shipped."""
        return tuple(
            self._file_row(entry)
            for entry in self._files
            if entry.measured is not entry.baseline and entry.measured.available
        )

    def row_of(self, path: str) -> FileRow | None:
        """The row of any file, float's too; None if it was not judged."""
        return next((self._file_row(entry) for entry in self._files if entry.file.path == path), None)

    def _file_row(self, entry: "_Entry") -> FileRow:
        return entry.file_row(float_ms=self._chosen[0].p50_ms, reported=entry in self._chosen)


def judge(variants: Sequence[Measured], gate: GateRecipe) -> Verdict:
    """Judge every file, choose one for each variant, and the one to ship.

    A variant's row is about the winning file, or the one that would win among its own, inside the gate if any is.

    Args:
        variants: The float model first.
        gate: What a file may lose.
    """
    baseline = variants[0]
    entries = tuple(_Entry(measured, file, baseline, gate) for measured in variants for file in measured.files)
    inside = [entry for entry in entries if entry.accepted and entry.measured is not baseline]
    won = choose([entry.contender for entry in inside]) if inside else None
    winner = inside[won.place] if won else None
    chosen = tuple(_reported(measured, entries, winner) for measured in variants)
    return Verdict(entries, chosen, winner, won.reason if won else None)


def _reported(measured: Measured, entries: Sequence["_Entry"], winner: "_Entry | None") -> "_Entry":
    own = [entry for entry in entries if entry.measured is measured]
    if winner in own:
        return winner
    candidates = [entry for entry in own if entry.accepted] or own
    return candidates[choose([entry.contender for entry in candidates]).place]


@dataclass(frozen=True, eq=False)
class _Entry:
    """A file of a variant, and the gate that judges it."""

    measured: Measured
    file: File
    baseline: Measured
    gate: GateRecipe

    @property
    def p50_ms(self) -> float:
        """Median time for one image on one thread."""
        return self.contender.p50_ms

    @cached_property
    def contender(self) -> Contender:
        """The file in its runtime, to be compared with others."""
        return Contender(
            self.measured.variant.name,
            self.measured.samples_ms[self.file.runtime, *SETTING],
            self.file.selection.top1_correct,
            self.file.size_bytes,
        )

    @property
    def accepted(self) -> bool:
        """Inside the gate, and for a runtime that is allowed."""
        return self.outcome == "inside"

    @property
    def outcome(self) -> str:
        """inside, outside, undecided, slower or unavailable."""
        return self._judged[0] if self.measured.available else "unavailable"

    def _is_too_slow(self) -> bool:
        least = self.gate.min_speedup
        if least == 0:
            return False
        of_float = [self.baseline.samples_ms[file.runtime, *SETTING] for file in self.baseline.files]
        fastest = min(of_float, key=np.median)
        return significance.is_slower(self.contender.samples_ms, [sample / least for sample in fastest])

    @cached_property
    def _judged(self) -> tuple[str, int | None]:
        """Whether it is inside the gate, or why not; then, if undecided, about how many images would decide."""
        if self.measured is self.baseline:
            return "inside", None
        if is_inside(self._drop.drop, self.gate) and self._is_too_slow():
            return "slower", None
        return judge_drop(self.baseline.files[0].validation, self.file.validation, self.gate, self.file.out_of)

    @cached_property
    def _drop(self) -> significance.PairedDrop:
        """The drop of top-1 against float."""
        before, after = self.baseline.files[0].validation, self.file.validation
        return find_drop(before, after, stopped=self.file.out_of is not None)

    @property
    def _certain(self) -> dict[str, Any]:
        """What a row says of an evaluation that ended once the verdict was certain."""
        if self.file.out_of is None or self.measured is self.baseline:
            return {}
        before, after = self.baseline.files[0].validation, self.file.validation
        found = certain_interval(before, after, self.gate, self.file.out_of)
        return {
            "num_images_available": self.file.out_of,
            "certain_low": found.low,
            "certain_high": found.high,
        }

    def file_row(self, *, float_ms: float, reported: bool) -> FileRow:
        """The file's row."""
        paired = self._drop
        return FileRow(
            **self._certain,
            num_images=len(self.file.validation),
            variant=self.measured.variant.name,
            path=self.file.path,
            sha256=self.file.sha256,
            size_bytes=self.file.size_bytes,
            runtime=self.file.runtime,
            top1=self.file.validation.top1,
            top1_drop=paired.drop,
            top1_drop_low=paired.low,
            top1_drop_high=paired.high,
            p_value=paired.p_value,
            top1_selection=self.file.selection.top1,
            latency_p50_ms=self.p50_ms,
            speedup=float_ms / self.p50_ms,
            gate=self.outcome,
            num_images_to_decide=self._judged[1],
            reported=reported,
        )

    def variant_row(self, run_info: RunInfo, *, float_ms: float, reason: str | None, pareto: bool | None) -> VariantRow:
        """The variant's row; the winner's if there is a reason."""
        measured, file, variant = self.measured, self.file, self.measured.variant
        scheme = variant.scheme
        paired, by_runtime, onnx = self._drop, measured.latencies_ms, measured.fastest_onnx
        simulated = {parts: predictions.top1 for parts, predictions in measured.simulated.items()}
        return VariantRow(
            **self._certain,
            recipe=run_info.recipe,
            variant=variant.name,
            method=variant.method,
            qconfig=variant.qconfig,
            engine=variant.engine,
            observer=scheme.observer if scheme else None,
            weights=scheme.weights if scheme else None,
            activation_bits=scheme.activation_bits if scheme else None,
            float_layers=list(scheme.float_layers) if scheme else None,
            int8_share=measured.int8_share,
            equalized=variant.equalized,
            smoothing=variant.smoothing,
            bias_corrected=variant.bias_corrected,
            top1=file.validation.top1,
            top5=file.validation.top5_accuracy,
            loss=file.validation.mean_loss,
            num_images=len(file.validation),
            top1_drop=paired.drop,
            top1_drop_low=paired.low,
            top1_drop_high=paired.high,
            p_value=paired.p_value,
            top1_selection=file.selection.top1,
            selected_on=run_info.selected_on,
            top1_simulated=simulated.get("both"),
            top1_weights_only=simulated.get("weights"),
            top1_activations_only=simulated.get("activations"),
            best_epoch=next((epoch.metrics["epoch"] for epoch in measured.epochs if epoch.chosen), None),
            top1_start=measured.start_validation.top1 if measured.start_validation else None,
            kept_start=measured.kept_start,
            size_bytes=file.size_bytes,
            runtime=file.runtime,
            latency_p50_ms=self.p50_ms,
            speedup=float_ms / self.p50_ms,
            fastest_runtime=min(by_runtime, key=lambda runtime: by_runtime[runtime]),
            fastest_p50_ms=min(by_runtime.values()),
            accepted=self.accepted,
            gate=self.outcome,
            num_images_to_decide=self._judged[1],
            winner=reason is not None,
            reason=reason,
            pareto=pareto,
            artifact_sha256=file.sha256,
            artifact_path=file.path,
            torchscript_path=measured.torchscript_path,
            torchscript_refusal=measured.torchscript_refusal,
            onnx_path=onnx.path if onnx else next(iter(measured.onnx_paths), None),
            onnx_top1=onnx.validation.top1 if onnx else None,
            onnx_refusal=measured.onnx_refusal,
            other_refusal=measured.other_refusal,
            torch_version=run_info.torch_version,
            cpu_model=run_info.cpu_model,
            created_at=run_info.created_at,
        )
