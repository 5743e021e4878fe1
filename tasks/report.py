"""The task that reports. It is no stage: its tables and files are made anew for every run, cached or not."""

import importlib.metadata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from quantlib import diagnosis, examples, machine, predictions, report, verdict
from quantlib.machine import Runtime
from quantlib.predictions import Predictions
from quantlib.recipe import Recipe
from quantlib.report import ClassRow, Report
from quantlib.scheme import Scheme
from quantlib.store import Ref, Store
from tasks import tracking
from tasks.measure import Contender
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
class OnnxRefs:
    """A variant as ONNX."""

    file: Ref
    """Or why there is none."""
    runtime: Runtime | None = None
    """That its accuracy was measured in; None: there is no file."""
    validation: tuple[Ref, ...] = ()


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
    onnx: OnnxRefs | None = None
    """None for float, and where no runtime for ONNX is installed."""
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

    @property
    def candidates(self) -> tuple[tuple[Ref, tuple[Ref, ...]], ...]:
        """(artifact, its answers on validation) of whatever `artifact` is one of."""
        found = (*((self.start,) if self.start else ()), *self.epochs) or (self,)
        return tuple((candidate.artifact, candidate.validation) for candidate in found)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What a run has found."""

    variants: tuple[VariantRefs, ...]
    contenders: tuple[Contender, ...]
    """What was timed."""
    timings: Ref
    pictures: Ref | None
    """Example images, where any are asked for."""
    notes: tuple[str, ...]
    """What is to be said of the run."""


@task(persist_result=False, cache_policy=NO_CACHE)
def write_report(recipe: Recipe, classes: tuple[str, ...], measurements: Measurements) -> Report:
    """Gather what was measured, give the verdict, write the tables, and lay out the files of the variants."""
    run = current_run()
    by_file: dict[Ref, dict[tuple[str, int, int], list[float]]] = {}
    for timing in run.store.read_json(measurements.timings):
        contender = measurements.contenders[timing["model"]]
        setting = contender.runtime.name, timing["batch_size"], timing["num_threads"]
        by_file.setdefault(contender.artifact, {})[setting] = timing["samples_ms"]
    folder = run.home / "models" / run.run_id
    measured = [_measured(run.store, refs, by_file, folder) for refs in measurements.variants]
    circumstances = verdict.Circumstances(
        recipe=recipe.name,
        selected_on=recipe.evaluation.select_on,
        torch_version=importlib.metadata.version("torch"),
        cpu_model=machine.cpu_model(),
        created_at=datetime.now(UTC),
    )
    found = Report(
        run_id=run.run_id,
        variants=verdict.variant_rows(measured, recipe.gate, circumstances),
        epochs=verdict.epoch_rows(measured),
        latency=verdict.latency_rows(measured),
        stages=tuple(run.stages),
        classes=tuple(ClassRow(class_index=index, name=name) for index, name in enumerate(classes)),
        examples=examples.load(run.store.read(measurements.pictures)) if measurements.pictures is not None else (),
        notes=measurements.notes,
        layers=tuple(
            row
            for variant in measured
            for row in diagnosis.layer_rows(variant.name, circumstances.selected_on, variant.layers)
        ),
    )
    report.write(run.home / "reports", found, {variant.name: variant.validation for variant in measured})
    tracking.publish(found, run.home / "reports")
    return found


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
    place = store.lay_out(refs.artifact, folder / f"{refs.name}.pt")
    return verdict.Measured(
        name=refs.name,
        method=refs.method,
        qconfig=refs.qconfig,
        engine=refs.engine,
        scheme=refs.scheme,
        equalized=refs.equalized,
        bias_corrected=refs.bias_corrected,
        validation=read_predictions(store, chosen.validation),
        selection=read_predictions(store, chosen.selection),
        simulated={parts: read_predictions(store, shards) for parts, shards in refs.simulated.items()},
        layers=[store.read_json(part) for part in refs.layers],
        epochs=epochs,
        start_validation=read_predictions(store, refs.start.validation) if refs.start else None,
        kept_start=chosen is refs.start if refs.start else None,
        samples_ms=samples[refs.artifact] | (samples.get(refs.onnx.file, {}) if refs.onnx else {}),
        onnx=_measured_onnx(store, refs.onnx, folder / f"{refs.name}.onnx") if refs.onnx else None,
        artifact_sha256=refs.artifact.sha256,
        artifact_path=str(place),
        size_bytes=refs.artifact.size,
    )


def _measured_onnx(store: Store, refs: OnnxRefs, place: Path) -> verdict.Onnx:
    if refs.runtime is None:
        return verdict.Onnx(refusal=store.read_json(refs.file)["reason"])
    return verdict.Onnx(path=str(store.lay_out(refs.file, place)), validation=read_predictions(store, refs.validation))


def read_predictions(store: Store, shards: tuple[Ref, ...]) -> Predictions:
    """The answers of consecutive shards as one."""
    return predictions.concatenate([predictions.load(store.read(ref)) for ref in shards])
