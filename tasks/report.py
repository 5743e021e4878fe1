"""The task that writes the report. It is not a stage: every run writes its tables and files again, cached or not."""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from quantlib.data import loading
from quantlib.export import bundle, checksums
from quantlib.export.bundle import Preprocessing
from quantlib.files import write_atomically
from quantlib.inputs import Inputs
from quantlib.measure import examples, predictions
from quantlib.measure.predictions import Predictions
from quantlib.recipe.schema import Recipe
from quantlib.recipe.sections import GateRecipe
from quantlib.report import caveats, diagnosis, tables, verdict
from quantlib.report.documents import Documents
from quantlib.report.gate import judge_drop
from quantlib.report.measured import Epoch, File, Measured, epoch_rows, latency_rows
from quantlib.report.model_change import Results
from quantlib.report.regression import check_regression
from quantlib.report.results import Report
from quantlib.report.rows import ClassRow, NoteRow
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks import tracking
from tasks.execution import LiveRun
from tasks.export import is_refusal
from tasks.refs import BenchmarkTarget, FileRefs, Measurements, VariantRefs
from tasks.run import Run


def write_report(run: LiveRun, recipe: Recipe, inputs: Inputs, measurements: Measurements) -> Report:
    """Collect the measurements, give the verdict, write the tables, and copy out the files of the variants."""
    samples = read_samples(run.store, measurements.targets, measurements.timings)
    measured = [_measured(run.store, refs, samples, run.models) for refs in measurements.variants]
    run_info = verdict.RunInfo(
        recipe=recipe.name,
        selected_on=recipe.evaluation.select_on,
        torch_version=importlib.metadata.version("torch"),
        cpu_model=run.machine.cpu_model,
        created_at=datetime.now(UTC),
    )
    judged = verdict.judge(measured, recipe.gate)
    rows = judged.variant_rows(run_info)
    classes, preprocessing = inputs.val.classes, Preprocessing.of(inputs.transform)
    shared = Documents(
        run_id=run.run_id,
        recipe=recipe,
        classes=classes,
        preprocessing=preprocessing,
        judged=judged,
        rows=rows,
    )
    _write_files(run, measurements, shared)
    doubts = caveats.find_caveats(rows, recipe.gate, len(classes), measurements.search_best)
    found = Report(
        run_id=run.run_id,
        variants=rows,
        files=judged.file_rows(),
        epochs=epoch_rows(measured),
        latency=latency_rows(measured),
        stages=tuple(run.stages),
        classes=tuple(ClassRow(class_index=index, name=name) for index, name in enumerate(classes)),
        preprocessing=(preprocessing,),
        examples=examples.load(run.store.read(measurements.pictures)) if measurements.pictures is not None else (),
        notes=(
            *(NoteRow(kind="warning", text=text) for text in doubts),
            *(
                NoteRow(kind="note", text=text)
                for text in (judged.lead, *_untimed(run.store, measurements.variants))
                if text
            ),
            *measurements.notes,
        ),
        layers=tuple(
            row
            for each in measured
            for row in diagnosis.layer_rows(each.variant.name, run_info.selected_on, each.layers)
        ),
    )
    answers = {row.variant: file.validation for row, file in zip(rows, judged.reported, strict=True)}
    names = loading.find_names(measurements.validation)
    if recipe.gate.fail_on_regression:
        results = Results(found, tables.predictions_table(answers, names), inputs.validation.split.fingerprint)
        found = replace(found, notes=(*found.notes, check_regression(run.home / "reports", run.store, results)))
    tables.write(run.home / "reports", found, answers, names)
    tracking.publish(found, run.home / "reports")
    return found


def _untimed(store: Store, variants: Sequence[VariantRefs]) -> list[str]:
    """What was not timed on some engine because it does not run there."""
    return [
        f"{refs.variant.name} was not timed in {runtime.name}: {store.read_json(file)['reason']}"
        for refs in variants
        for runtime, file in refs.engines
        if is_refusal(file)
    ]


def _write_files(run: LiveRun, measurements: Measurements, shared: Documents) -> None:
    """Copy out the files of every variant, each with its document, and write their checksums."""
    digests: dict[str, str] = {}
    for refs, row in zip(measurements.variants, shared.rows, strict=True):
        for file in refs.runtimes:
            place = _place(run.models, refs, file)
            info = shared.describe(row, place, file.sha256, _runtime_of(refs, file))
            content = bundle.attach(run.store.read(file), file.kind, info)
            write_atomically(place, content)
            digests[place.name] = hashlib.sha256(content).hexdigest()
    checksums.write(run.models, digests)


def _runtime_of(refs: VariantRefs, file: Ref) -> Runtime:
    """The runtime that a file was judged in, or is for."""
    return next((each.runtime for each in _files(refs) if each.file == file), refs.runtimes[file][0])


def find_reported(
    run: Run,
    recipe: Recipe,
    variants: tuple[VariantRefs, ...],
    targets: tuple[BenchmarkTarget, ...],
    timings: Ref,
) -> tuple[FileRefs, ...]:
    """The file of each variant that the report will be about.

    Raises:
        NotYetKnownError: In a plan, if something has not been measured yet.
    """
    store = run.known((variants, timings))
    samples = read_samples(store, targets, timings)
    measured = [_measured(store, refs, samples, Path()) for refs in variants]
    reported = verdict.judge(measured, recipe.gate).reported
    return tuple(
        next(refs for refs in _files(variant) if refs.file.sha256 == file.sha256 and refs.runtime.name == file.runtime)
        for variant, file in zip(variants, reported, strict=True)
    )


def is_certain(run: Run, gate: GateRecipe, baseline: tuple[Ref, ...], answers: tuple[Ref, ...], out_of: int) -> bool:
    """Whether it is certain on which side of the gate a variant lies, from its answers so far.

    Args:
        run: The run.
        gate: The gate.
        baseline: Float's answers, shard by shard.
        answers: The variant's, for the same shards or the first of them.
        out_of: How many validation images there are.

    Raises:
        NotYetKnownError: In a plan, if the shards have not been evaluated yet.
    """
    store = run.known((baseline, answers))
    found, _ = judge_drop(read_predictions(store, baseline), read_predictions(store, answers), gate, out_of)
    return found != "undecided"


def _files(refs: VariantRefs) -> tuple[FileRefs, ...]:
    """The files that the variant is judged by."""
    return refs.files or (refs.reference,)


def _place(folder: Path, refs: VariantRefs, file: Ref) -> Path:
    runtime, *_ = refs.runtimes[file]
    # One ONNX file serves every runtime, or each has its own.
    alike = [each for each, *_ in refs.runtimes.values() if each.suffix == runtime.suffix]
    own = "" if len(alike) == 1 else f".{runtime.name}"
    return folder / f"{refs.variant.name}{own}{runtime.suffix}"


def _measured(
    store: Store, refs: VariantRefs, samples: dict[Ref, dict[tuple[str, int, int], list[float]]], folder: Path
) -> Measured:
    epochs = tuple(
        Epoch(
            metrics=store.read_json(epoch.metrics),
            validation=read_predictions(store, epoch.reference.validation),
            selection=read_predictions(store, epoch.reference.selection),
            chosen=place == refs.best_epoch,
        )
        for place, epoch in enumerate(refs.epochs)
    )
    files = tuple(
        File(
            path=str(_place(folder, refs, file.file)),
            sha256=file.file.sha256,
            size_bytes=file.file.size,
            runtime=file.runtime.name,
            validation=read_predictions(store, file.validation),
            selection=read_predictions(store, file.selection),
            out_of=file.out_of,
        )
        for file in _files(refs)
    )
    paths = [(runtime.suffix, str(_place(folder, refs, file))) for file, (runtime, *_) in refs.runtimes.items()]
    refused = [(runtime.suffix, store.read_json(file)["reason"]) for runtime, file in refs.saved if is_refusal(file)]
    return Measured(
        variant=refs.variant,
        int8_share=store.read_json(refs.plan)["int8_share"] if refs.plan else None,
        files=files,
        available=bool(refs.files),
        simulated={parts: read_predictions(store, shards) for parts, shards in refs.simulated.items()},
        layers=[store.read_json(part) for part in refs.layers],
        epochs=epochs,
        start_validation=read_predictions(store, refs.start.reference.validation) if refs.start else None,
        kept_start=refs.best_epoch is None if refs.start else None,
        samples_ms={setting: times for file in refs.runtimes for setting, times in samples[file].items()},
        torchscript_path=next((path for suffix, path in paths if suffix == ".pt"), None),
        torchscript_refusal=_joined(reason for suffix, reason in refused if suffix == ".pt"),
        onnx_paths=tuple(path for suffix, path in paths if suffix == ".onnx"),
        onnx_refusal=_joined(reason for suffix, reason in refused if suffix == ".onnx"),
        other_refusal=_joined(reason for suffix, reason in refused if suffix not in {".pt", ".onnx"}),
    )


def _joined(reasons: Iterable[str]) -> str | None:
    return " ".join(dict.fromkeys(reasons)) or None


def read_samples(
    store: Store, targets: tuple[BenchmarkTarget, ...], timings: Ref
) -> dict[Ref, dict[tuple[str, int, int], list[float]]]:
    """Results of `benchmark`: milliseconds by file, then by (runtime, batch size, threads).

    Args:
        store: The store that holds them.
        targets: What was timed.
        timings: The output of `benchmark`.
    """
    samples: dict[Ref, dict[tuple[str, int, int], list[float]]] = {}
    for timing in store.read_json(timings):
        target = targets[timing["model"]]
        setting = target.runtime.name, timing["batch_size"], timing["num_threads"]
        samples.setdefault(target.artifact, {})[setting] = timing["samples_ms"]
    return samples


def read_predictions(store: Store, shards: tuple[Ref, ...]) -> Predictions:
    """The answers of consecutive shards as one."""
    return predictions.load_shards(map(store.read, shards))
