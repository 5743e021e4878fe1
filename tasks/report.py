"""The task that reports. It is no stage: its tables and files are made anew for every run, cached or not."""

import importlib.metadata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from quantlib import diagnosis, machine, predictions, report, verdict
from quantlib.predictions import Predictions
from quantlib.recipe import Recipe
from quantlib.report import Report
from quantlib.scheme import Scheme
from quantlib.store import Ref, Store
from tasks import tracking
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


@task(persist_result=False, cache_policy=NO_CACHE)
def write_report(
    recipe: Recipe, variants: tuple[VariantRefs, ...], timings: Ref, notes: tuple[str, ...] = ()
) -> Report:
    """Gather what was measured, give the verdict, write the tables, and lay out the files of the variants."""
    run = current_run()
    by_model: list[dict[tuple[int, int], list[float]]] = [{} for _ in variants]
    for timing in run.store.read_json(timings):
        by_model[timing["model"]][timing["batch_size"], timing["num_threads"]] = timing["samples_ms"]
    measured = [
        _measured(run.store, refs, samples, run.home / "models" / run.run_id)
        for refs, samples in zip(variants, by_model, strict=True)
    ]
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
        notes=notes,
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
    store: Store, refs: VariantRefs, samples: dict[tuple[int, int], list[float]], folder: Path
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
        samples_ms=samples,
        artifact_sha256=refs.artifact.sha256,
        artifact_path=str(place),
        size_bytes=refs.artifact.size,
    )


def read_predictions(store: Store, shards: tuple[Ref, ...]) -> Predictions:
    """The answers of consecutive shards as one."""
    return predictions.concatenate([predictions.load(store.read(ref)) for ref in shards])
