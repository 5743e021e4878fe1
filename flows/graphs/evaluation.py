"""How a variant's model becomes files, and how these are evaluated."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import cast, get_args

from flows.graphs.shared_stages import SharedStages
from quantlib.errors import ModelError
from quantlib.report.choice import fastest_runtime
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.export import is_refusal, save_onnx, save_program, script_and_save, try_file
from tasks.measure import Rounded, benchmark, evaluate, evaluate_baseline, simulate
from tasks.planning import Pending
from tasks.quantize import convert
from tasks.refs import BenchmarkTarget, CandidateRefs, FileRefs, VariantRefs
from tasks.report import is_certain, read_samples
from tasks.run import NotYetKnownError, together


def find_reference(shared: SharedStages, model: Ref, name: str, engine: str | None) -> FileRefs:
    """The file that choices are made by, not evaluated: the first that there is, of those that may be shipped if any.

    Raises:
        ModelError: If there is none.
    """
    refusals = []
    for runtime in shared.runtimes(engine):
        file = save_file(shared, model, runtime, name)
        if not is_refusal(file):
            return FileRefs(file=file, runtime=runtime)
        refusals.append(file)
    store = shared.run.known(refusals)
    reasons = [store.read_json(refusal)["reason"] for refusal in refusals]
    raise ModelError(f"No runtime can run the model. {' '.join(dict.fromkeys(reasons))}")


def save_files(shared: SharedStages, model: Ref, name: str, engine: str | None) -> tuple[tuple[Runtime, Ref], ...]:
    """The file of a variant for each runtime, or why there is none."""
    runtimes = shared.runtimes(engine)
    files = together(shared.run, [partial(save_file, shared, model, runtime, name) for runtime in runtimes])
    return tuple(zip(runtimes, files, strict=True))


def save_file(shared: SharedStages, model: Ref, runtime: Runtime, name: str) -> Ref:
    """The file of a model for a runtime, or why there is none."""
    label = name if runtime.kind == "torchscript" else f"{name}-{runtime.name}"

    def save() -> Ref:
        images, interface = shared.validation[0], shared.interface
        if runtime.suffix == ".onnx":
            return shared.run(save_onnx, shared.onnx_draft, model, images, runtime, interface, branch=label)
        if runtime.kind == "torchscript":
            return shared.run(script_and_save, model, runtime, images, interface, branch=label)
        return shared.run(save_program, model, images, runtime, interface, branch=label)

    return shared.run.once(f"save {label} of {model}", save)


def try_engines(shared: SharedStages, model: Ref, name: str) -> tuple[tuple[Runtime, Ref], ...]:
    """A variant's TorchScript file on each engine but the one that it was checked on, or why it does not run there."""
    machine = shared.run.machine
    if not shared.recipe.has_torchscript:
        return ()
    own = machine.torch_runtime(shared.engine)
    file = save_file(shared, model, own, name)
    if is_refusal(file):
        return ()

    def try_in(runtime: Runtime) -> tuple[Runtime, Ref]:
        images, label = shared.validation[0], f"{name}-{runtime.name}"
        return runtime, shared.run(try_file, file, images, own, runtime, shared.interface, branch=label)

    runtimes = [machine.torch_runtime(engine) for engine in machine.engines if engine != shared.engine]
    return together(shared.run, [partial(try_in, runtime) for runtime in runtimes])


Measure = Callable[[Ref, str], Ref]
"""Evaluates a file on a shard; the shard has a name."""


def _evaluator(shared: SharedStages, file: FileRefs, *, is_baseline: bool = False) -> Measure:
    batch_size, interface = shared.recipe.evaluation.batch_size, shared.interface
    stage = evaluate_baseline if is_baseline else evaluate
    return lambda shard, label: shared.run(stage, file.file, shard, batch_size, file.runtime, interface, branch=label)


def evaluate_float(shared: SharedStages, reference: FileRefs) -> FileRefs:
    """The float model's file, evaluated; where evaluation may stop, on the selection images alone for now."""
    measure = _evaluator(shared, reference, is_baseline=True)
    if shared.recipe.may_stop:
        return _measure_selection(shared, "float", reference, measure)
    return _measure_all(shared, "float", reference, measure)


def evaluate_selection(shared: SharedStages, name: str, file: FileRefs) -> FileRefs:
    """A file evaluated on the selection images, for a choice."""
    return _measure_selection(shared, name, file, _evaluator(shared, file))


def evaluate_candidate(shared: SharedStages, prepared: Ref, name: str) -> CandidateRefs:
    """A calibrated model or a QAT state, converted, and the file that it is judged by, evaluated."""
    model = shared.run(convert, prepared, branch=name)
    file = find_reference(shared, model, name, shared.engine)
    return CandidateRefs(model=model, reference=_measure_all(shared, name, file, _evaluator(shared, file)))


def targets_of(refs: VariantRefs) -> list[BenchmarkTarget]:
    """A variant's files in every runtime that a machine has for them."""
    return [BenchmarkTarget(file, runtime) for file, runtimes in refs.runtimes.items() for runtime in runtimes]


def time_files(
    shared: SharedStages,
    targets: tuple[BenchmarkTarget, ...],
    batch_sizes: tuple[int, ...],
    num_threads: tuple[int, ...],
    name: str,
) -> Ref:
    """Time files in turns, so that each can be compared with each."""
    return shared.run(
        benchmark,
        targets,
        shared.validation[0],
        shared.run.machine.cpu_model,
        batch_sizes,
        num_threads,
        shared.recipe.benchmark.num_samples,
        shared.interface,
        branch=name,
    )


def evaluate_files(
    shared: SharedStages, variants: tuple[VariantRefs, ...], targets: tuple[BenchmarkTarget, ...], timings: Ref
) -> tuple[VariantRefs, ...]:
    """The variants, each with the files that may be shipped, evaluated in the runtime where each is fastest."""
    allowed: dict[Ref, list[Runtime]] = {}
    for target in targets:
        if shared.may_ship(target.runtime):
            allowed.setdefault(target.artifact, []).append(target.runtime)
    try:
        samples = read_samples(shared.run.known(timings), targets, timings)
    except NotYetKnownError:
        samples = None

    def runtime_for(file: Ref) -> Runtime:
        if samples is None:
            return cast("Runtime", Pending("benchmark-variants"))
        return fastest_runtime({runtime: samples[file][runtime.name, 1, 1] for runtime in allowed[file]})

    baseline, *others = variants
    float_shards = FloatShards(shared, baseline.reference)

    def evaluate_variant(refs: VariantRefs) -> VariantRefs:
        places = [(file, runtime_for(file)) for file in refs.runtimes if file in allowed]
        if not places:  # It is judged by this one.
            return replace(refs, reference=_evaluate_known(shared, refs, refs.reference, float_shards))
        calls = [partial(_evaluate_in, shared, refs, file, runtime, float_shards) for file, runtime in places]
        return replace(refs, files=together(shared.run, calls))

    evaluated = together(shared.run, [partial(evaluate_variant, refs) for refs in others])
    if shared.recipe.may_stop:
        judged = [file for refs in evaluated for file in (refs.files or (refs.reference,))]
        count = max(len(file.validation) for file in judged)
        baseline = replace(baseline, reference=replace(baseline.reference, validation=float_shards.first(count)))
    # Float's accuracy is the same in every runtime, up to rounding: it is measured once.
    places = [(file, runtime_for(file)) for file in baseline.runtimes if file in allowed]
    files = tuple(replace(baseline.reference, file=file, runtime=runtime) for file, runtime in places)
    return replace(baseline, files=files), *evaluated


def _evaluate_in(
    shared: SharedStages, refs: VariantRefs, file: Ref, runtime: Runtime, float_shards: "FloatShards"
) -> FileRefs:
    """A file of a variant evaluated in a runtime; what a choice has evaluated of it is taken over."""
    known = refs.reference
    if (file, runtime) != (known.file, known.runtime):
        known = FileRefs(file=file, runtime=runtime)
    return _evaluate_known(shared, refs, known, float_shards)


def _evaluate_known(shared: SharedStages, refs: VariantRefs, file: FileRefs, float_shards: "FloatShards") -> FileRefs:
    measure, runtime = _evaluator(shared, file), file.runtime
    name = f"{refs.variant.name}-{runtime.name if isinstance(runtime, Runtime) else 'benchmark'}"
    if shared.recipe.stops(refs.variant.name):
        return _until_certain(shared, _measure_selection(shared, name, file, measure), name, float_shards)
    return _measure_all(shared, name, file, measure)


class FloatShards:
    """Float's answers for the validation shards, each evaluated when it is first asked for."""

    def __init__(self, shared: SharedStages, reference: FileRefs) -> None:
        self._shared, self._measure = shared, _evaluator(shared, reference, is_baseline=True)

    def first(self, count: int) -> tuple[Ref, ...]:
        """The answers for the first shards."""
        return tuple(map(self._answers, range(count)))

    def _answers(self, number: int) -> Ref:
        shards = self._shared.validation
        label = shard_label("float", number, len(shards))
        return self._shared.run.once(f"evaluate_baseline-{label}", lambda: self._measure(shards[number], label))


def _until_certain(shared: SharedStages, file: FileRefs, name: str, float_shards: FloatShards) -> FileRefs:
    """A file evaluated shard by shard until it is certain on which side of the gate it lies.

    A plan that cannot know goes through every shard.
    """
    shards, images = shared.validation, shared.inputs.validation
    measure, out_of = _evaluator(shared, file), images.stop - images.start
    answers: tuple[Ref, ...] = ()
    for number in range(len(shards)):
        if number < len(file.validation):  # QAT's epochs are evaluated on all images.
            found = file.validation[number]
        else:
            found = measure(shards[number], shard_label(name, number, len(shards)))
        answers = (*answers, found)
        with suppress(NotYetKnownError):
            if is_certain(shared.run, shared.recipe.gate, float_shards.first(len(answers)), answers, out_of):
                break
    return replace(file, validation=answers, out_of=out_of)


def evaluate_simulated(
    shared: SharedStages, model: Ref, name: str, *, uncorrected: Ref | None = None
) -> dict[str, tuple[Ref, ...]]:
    """Answers with weights, activations or both rounded.

    Activations alone are rounded in the model without bias correction, if there is one: a corrected bias makes up for
    rounded weights, and here the weights are not rounded.
    """
    evaluation = shared.recipe.evaluation
    if not evaluation.simulate:
        return {}
    plain = model if uncorrected is None else shared.run(convert, uncorrected, branch=f"{name}-uncorrected")

    def simulate_on_shards(parts: Rounded) -> tuple[Ref, ...]:
        rounded = plain if parts == "activations" else model
        shards = label_shards(shared.validation, name)
        return together(
            shared.run,
            [
                partial(shared.run, simulate, rounded, shard, evaluation.batch_size, parts, branch=label)
                for shard, label in shards
            ],
        )

    waits = {parts: shared.run.begin(partial(simulate_on_shards, parts)) for parts in get_args(Rounded)}
    return {parts: wait() for parts, wait in waits.items()}


def _measure_all(shared: SharedStages, name: str, file: FileRefs, measure: Measure) -> FileRefs:
    """A file measured on the validation images and on the selection images, where it has not been yet."""
    on_validation = shared.run.begin(lambda: file.validation or _measure_on(shared, shared.validation, name, measure))
    selection = file.selection or _measure_on(shared, shared.held_out, f"{name}-held_out", measure)
    validation = on_validation()
    return replace(file, validation=validation, selection=selection or validation)


def _measure_selection(shared: SharedStages, name: str, file: FileRefs, measure: Measure) -> FileRefs:
    if file.selection:
        return file
    if not shared.held_out:  # The recipe selects on validation.
        return _measure_all(shared, name, file, measure)
    return replace(file, selection=_measure_on(shared, shared.held_out, f"{name}-held_out", measure))


def _measure_on(shared: SharedStages, shards: Sequence[Ref], name: str, measure: Measure) -> tuple[Ref, ...]:
    return together(shared.run, [partial(measure, shard, label) for shard, label in label_shards(shards, name)])


def label_shards(shards: Sequence[Ref], name: str) -> list[tuple[Ref, str]]:
    """Each shard with a name for its task run, numbered if there is more than one."""
    return [(shard, shard_label(name, n, len(shards))) for n, shard in enumerate(shards)]


def shard_label(name: str, number: int, num_shards: int) -> str:
    """The name of a shard's task run."""
    return f"{name}-{number}" if num_shards > 1 else name
