"""The task that reports. It is no stage: its tables and files are made anew for every run, cached or not."""

import importlib.metadata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from quantlib import machine
from quantlib.data import loading
from quantlib.data.split import Selection
from quantlib.export import checksums
from quantlib.measure import examples, predictions
from quantlib.measure.predictions import Predictions
from quantlib.recipe.schema import Recipe
from quantlib.recipe.scheme import Scheme
from quantlib.report import caveats, diagnosis, tables, verdict
from quantlib.report.tables import ClassRow, NoteRow, Report
from quantlib.runtimes import available
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks import tracking
from tasks.caching import find_inside
from tasks.export import is_refusal
from tasks.findings import read_samples, store_with
from tasks.measure import Contender
from tasks.planning import Pending
from tasks.run import current_run


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

    name: str
    method: str
    qconfig: str | None
    engine: str | None
    scheme: Scheme | None
    equalized: bool
    bias_corrected: bool
    artifact: Ref
    onnx: Ref | None = None
    """The ONNX file, or why there is none; None where no runtime for it is installed."""
    files: tuple[FileRefs, ...] = ()
    """What may be shipped of it, once that is known; empty where no file of it is for a runtime that is allowed."""
    validation: tuple[Ref, ...] = ()
    """Empty for QAT: those of the epoch that was chosen are meant, or of the start."""
    selection: tuple[Ref, ...] = ()
    simulated: dict[str, tuple[Ref, ...]]
    layers: tuple[Ref, ...] = ()
    epochs: tuple[EpochRefs, ...] = ()
    start: CandidateRefs | None = None
    """Of QAT from a calibrated model: that model."""
    prepared: Ref | None = None
    """What was converted: a calibrated model, or an epoch's state; None: float."""

    @property
    def chosen(self) -> "CandidateRefs | VariantRefs":
        """Whose answers are the variant's: of QAT, the candidate's that was chosen."""
        # Two candidates can give the same file; the first of them is the one that was chosen.
        candidates = (*((self.start,) if self.start else ()), *self.epochs)
        return next((candidate for candidate in candidates if candidate.artifact == self.artifact), self)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What a run has found."""

    variants: tuple[VariantRefs, ...]
    contenders: tuple[Contender, ...]
    """What was timed."""
    timings: Ref
    validation: Selection
    """What every variant was evaluated on."""
    pictures: Ref | None
    """Example images, where any are asked for."""
    notes: tuple[NoteRow, ...]
    """What is to be said of the run."""
    search_best: str | None = None
    """The variant that the search ended with."""


@task(persist_result=False, cache_policy=NO_CACHE)
def write_report(recipe: Recipe, classes: tuple[str, ...], measurements: Measurements) -> Report:
    """Gather what was measured, give the verdict, write the tables, and lay out the files of the variants."""
    run = current_run()
    folder = run.home / "models" / run.run_id
    digests: dict[str, str] = {}
    for variant in measurements.variants:
        for file in (variant.artifact, onnx_file(variant)):
            if file is not None:
                place = run.store.lay_out(file, _place(folder, variant, file))
                digests[place.name] = file.sha256
    checksums.write(folder, digests)
    samples = read_samples(measurements.contenders, measurements.timings)
    measured = [_measured(run.store, refs, samples, folder) for refs in measurements.variants]
    circumstances = verdict.Circumstances(
        recipe=recipe.name,
        selected_on=recipe.evaluation.select_on,
        torch_version=importlib.metadata.version("torch"),
        cpu_model=machine.cpu_model(),
        created_at=datetime.now(UTC),
    )
    judged = verdict.judge(measured, recipe.gate)
    rows = judged.variant_rows(circumstances)
    doubts = caveats.find_caveats(rows, recipe.gate, len(classes), measurements.search_best)
    found = Report(
        run_id=run.run_id,
        variants=rows,
        files=judged.file_rows(),
        epochs=verdict.epoch_rows(measured),
        latency=verdict.latency_rows(measured),
        stages=tuple(run.stages),
        classes=tuple(ClassRow(class_index=index, name=name) for index, name in enumerate(classes)),
        examples=examples.load(run.store.read(measurements.pictures)) if measurements.pictures is not None else (),
        notes=(*(NoteRow(kind="warning", text=text) for text in doubts), *measurements.notes),
        layers=tuple(
            row
            for variant in measured
            for row in diagnosis.layer_rows(variant.name, circumstances.selected_on, variant.layers)
        ),
    )
    answers = {row.variant: file.validation for row, file in zip(rows, judged.reported, strict=True)}
    tables.write(run.home / "reports", found, answers, loading.find_names(measurements.validation))
    tracking.publish(found, run.home / "reports")
    return found


def find_reported(
    recipe: Recipe, variants: tuple[VariantRefs, ...], contenders: tuple[Contender, ...], timings: Ref
) -> tuple[FileRefs, ...]:
    """The file of each variant that the report will be about.

    Raises:
        NotYetKnownError: Where the run is only planned, and something was not measured before.
    """
    store = store_with(find_inside(variants, Pending))
    samples = read_samples(contenders, timings)
    measured = [_measured(store, refs, samples, Path()) for refs in variants]
    reported = verdict.judge(measured, recipe.gate).reported
    return tuple(
        next(refs for refs in _files(variant) if refs.file.sha256 == file.sha256 and refs.runtime.name == file.runtime)
        for variant, file in zip(variants, reported, strict=True)
    )


def _files(variant: VariantRefs) -> tuple[FileRefs, ...]:
    """What the variant is judged by."""
    if variant.files:
        return variant.files
    chosen, runtime = variant.chosen, available.torch_runtime(variant.engine)
    return (FileRefs(file=variant.artifact, runtime=runtime, validation=chosen.validation, selection=chosen.selection),)


def _place(folder: Path, variant: VariantRefs, file: Ref) -> Path:
    return folder / f"{variant.name}{'.pt' if file == variant.artifact else '.onnx'}"


def _measured(
    store: Store, refs: VariantRefs, samples: dict[Ref, dict[tuple[str, int, int], list[float]]], folder: Path
) -> verdict.Measured:
    chosen = refs.chosen
    epochs = tuple(
        verdict.Epoch(
            metrics=store.read_json(epoch.metrics),
            validation=read_predictions(store, epoch.validation),
            selection=read_predictions(store, epoch.selection),
            chosen=epoch is chosen,
        )
        for epoch in refs.epochs
    )
    files = tuple(
        verdict.File(
            path=str(_place(folder, refs, file.file)),
            sha256=file.file.sha256,
            size_bytes=file.file.size,
            runtime=file.runtime.name,
            validation=read_predictions(store, file.validation),
            selection=read_predictions(store, file.selection),
        )
        for file in _files(refs)
    )
    onnx = onnx_file(refs)
    return verdict.Measured(
        name=refs.name,
        method=refs.method,
        qconfig=refs.qconfig,
        engine=refs.engine,
        scheme=refs.scheme,
        equalized=refs.equalized,
        bias_corrected=refs.bias_corrected,
        files=files,
        available=bool(refs.files),
        simulated={parts: read_predictions(store, shards) for parts, shards in refs.simulated.items()},
        layers=[store.read_json(part) for part in refs.layers],
        epochs=epochs,
        start_validation=read_predictions(store, refs.start.validation) if refs.start else None,
        kept_start=chosen is refs.start if refs.start else None,
        samples_ms=samples[refs.artifact] | (samples.get(refs.onnx, {}) if refs.onnx else {}),
        torchscript_path=str(_place(folder, refs, refs.artifact)),
        onnx_path=str(_place(folder, refs, onnx)) if onnx else None,
        onnx_refusal=store.read_json(refs.onnx)["reason"] if refs.onnx and not onnx else None,
    )


def onnx_file(variant: VariantRefs) -> Ref | None:
    """The ONNX file, where there is one; of a run that is only planned, where there may be."""
    return None if variant.onnx is None or is_refusal(variant.onnx) else variant.onnx


def read_predictions(store: Store, shards: tuple[Ref, ...]) -> Predictions:
    """The answers of consecutive shards as one."""
    return predictions.concatenate([predictions.load(store.read(ref)) for ref in shards])
