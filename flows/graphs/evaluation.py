"""How a variant's model becomes files, and how these are evaluated."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import cast, get_args

from flows.graphs.shared_stages import SharedStages
from quantlib.errors import ModelError
from quantlib.report.choice import fastest_runtime
from quantlib.runtimes.available import Machine, Runtime
from quantlib.store.artifacts import Ref
from tasks.export import is_refusal, save_onnx, save_program, script_and_save, try_file
from tasks.measure import Rounded, benchmark, evaluate, evaluate_baseline, simulate
from tasks.planning import Pending
from tasks.quantize import convert
from tasks.refs import BenchmarkTarget, CandidateRefs, FileRefs, VariantRefs
from tasks.report import is_certain, read_samples
from tasks.run import NotYetKnownError, together


def evaluate_candidate(shared: SharedStages, prepared: Ref, name: str) -> CandidateRefs:
    """The file that a calibrated model or a QAT state would ship, evaluated."""
    return evaluate_model(shared, shared.run(convert, prepared, branch=name), name)


def evaluate_model(shared: SharedStages, model: Ref, name: str, *, stops: bool = False) -> CandidateRefs:
    """The file that a quantized model would be shipped as, evaluated.

    If its evaluation stops once the verdict is certain, it is evaluated on the selection images alone for now.
    """
    own = shared.run.machine.torch_runtime(shared.engine)
    artifact = shared.run(script_and_save, model, own, shared.validation[0], shared.interface, branch=name)
    others = save_files(shared, model, name, shared.runtimes[:1]) if is_refusal(artifact) else ()
    file, runtime = find_reference(shared, artifact, others, shared.engine)
    measure = _evaluator(shared, file, runtime)
    validation, selection = (
        ((), _measure_held_out(shared, name, measure)) if stops else measure_shards(shared, name, measure)
    )
    reference = FileRefs(file=file, runtime=runtime, validation=validation, selection=selection)
    return CandidateRefs(model=model, artifact=artifact, reference=reference)


def find_reference(
    shared: SharedStages, artifact: Ref, others: tuple[tuple[Runtime, Ref], ...], engine: str | None
) -> tuple[Ref, Runtime]:
    """The file that a model is judged by, and the runtime: TorchScript, or else the first other file.

    Raises:
        ModelError: If there is neither.
    """
    if not is_refusal(artifact):
        return artifact, shared.run.machine.torch_runtime(engine)
    for runtime, file in others:
        if not is_refusal(file):
            return file, runtime
    store = shared.run.known((artifact, others))
    reasons = [store.read_json(refusal)["reason"] for refusal in (artifact, *(file for _, file in others))]
    raise ModelError(f"No runtime can run the model. {' '.join(dict.fromkeys(reasons))}")


def save_files(
    shared: SharedStages, model: Ref, name: str, runtimes: tuple[Runtime, ...] | None = None
) -> tuple[tuple[Runtime, Ref], ...]:
    """The file of a variant for each runtime besides TorchScript, or for some, or why there is none."""

    def save(runtime: Runtime) -> tuple[Runtime, Ref]:
        return runtime, _save_file(shared, model, runtime, f"{name}-{runtime.name}")

    return together(
        shared.run, [partial(save, runtime) for runtime in (shared.runtimes if runtimes is None else runtimes)]
    )


def _save_file(shared: SharedStages, model: Ref, runtime: Runtime, label: str) -> Ref:
    images, interface = shared.validation[0], shared.interface
    if runtime.suffix == ".onnx":
        return shared.run(save_onnx, shared.onnx_draft, model, images, runtime, interface, branch=label)
    return shared.run(save_program, model, images, runtime, interface, branch=label)


def _evaluator(shared: SharedStages, file: Ref, runtime: Runtime) -> Callable[[Ref, str], Ref]:
    """What evaluates a file on a shard."""
    batch_size = shared.recipe.evaluation.batch_size
    return lambda shard, label: shared.run(evaluate, file, shard, batch_size, runtime, shared.interface, branch=label)


def evaluate_float(shared: SharedStages, reference: FileRefs) -> FileRefs:
    """The float model's file, evaluated; where evaluation may stop, on the selection images alone for now."""
    measure = _float_evaluator(shared, reference)
    if shared.recipe.may_stop:
        return replace(reference, selection=_measure_held_out(shared, "float", measure))
    validation, selection = measure_shards(shared, "float", measure)
    return replace(reference, validation=validation, selection=selection)


def _float_evaluator(shared: SharedStages, reference: FileRefs) -> Callable[[Ref, str], Ref]:
    batch_size = shared.recipe.evaluation.batch_size
    return lambda shard, label: shared.run(
        evaluate_baseline, reference.file, shard, batch_size, reference.runtime, shared.interface, branch=label
    )


def try_engines(shared: SharedStages, artifact: Ref, name: str) -> tuple[tuple[Runtime, Ref], ...]:
    """A variant's TorchScript file on each engine but the one that it was checked on, or why it does not run there."""
    if is_refusal(artifact):
        return ()

    def try_in(runtime: Runtime) -> tuple[Runtime, Ref]:
        images, label = shared.validation[0], f"{name}-{runtime.name}"
        return runtime, shared.run(try_file, artifact, images, runtime, shared.interface, branch=label)

    machine = shared.run.machine
    runtimes = [machine.torch_runtime(engine) for engine in machine.engines if engine != shared.engine]
    return together(shared.run, [partial(try_in, runtime) for runtime in runtimes])


def targets_of(refs: VariantRefs, machine: Machine) -> list[BenchmarkTarget]:
    """A variant's files in every runtime that a machine has for them; its own engine first."""
    script = refs.torchscript_file
    own = [] if script is None else [BenchmarkTarget(script, machine.torch_runtime(refs.variant.engine))]
    return [
        *own,
        *(BenchmarkTarget(file, runtime) for runtime, file in refs.engines if not is_refusal(file)),
        *(BenchmarkTarget(file, runtime) for file, runtimes in refs.other_files.items() for runtime in runtimes),
    ]


def may_ship(shared: SharedStages, target: BenchmarkTarget) -> bool:
    """Whether the recipe allows a file to be shipped for this runtime."""
    allowed = shared.recipe.gate.runtimes
    return allowed is None or target.runtime.kind in allowed


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
        if may_ship(shared, target):
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
        files = together(
            shared.run,
            [
                partial(_evaluate_in, shared, refs, file, runtime_for(file), float_shards)
                for file in (refs.artifact, *refs.other_files)
                if file in allowed
            ],
        )
        if files or refs is baseline or not shared.recipe.stops(refs.variant.name):
            return replace(refs, files=files)
        # It is judged by this one.
        return replace(refs, reference=_until_certain(shared, refs.reference, refs.variant.name, float_shards))

    evaluated = together(shared.run, [partial(evaluate_variant, refs) for refs in others])
    if shared.recipe.may_stop:
        judged = [file for refs in evaluated for file in (refs.files or (refs.reference,))]
        count = max(len(file.validation) for file in judged)
        baseline = replace(baseline, reference=replace(baseline.reference, validation=float_shards.first(count)))
    return evaluate_variant(baseline), *evaluated


def _evaluate_in(
    shared: SharedStages, refs: VariantRefs, file: Ref, runtime: Runtime, float_shards: "FloatShards"
) -> FileRefs:
    known, name = refs.reference, refs.variant.name
    # Float's accuracy is the same in every runtime, up to rounding: it is measured once.
    if refs.variant.engine is None:
        return replace(known, file=file, runtime=runtime)
    is_known = (file, runtime) == (known.file, known.runtime)
    label = name if is_known else f"{name}-{runtime.name if isinstance(runtime, Runtime) else 'benchmark'}"
    measure = _evaluator(shared, file, runtime)
    if shared.recipe.stops(name):
        selection = known.selection if is_known else _measure_held_out(shared, label, measure)
        unmeasured = FileRefs(
            file=file, runtime=runtime, validation=known.validation if is_known else (), selection=selection
        )
        return _until_certain(shared, unmeasured, label, float_shards)
    if is_known:
        return known
    validation, selection = measure_shards(shared, label, measure)
    return FileRefs(file=file, runtime=runtime, validation=validation, selection=selection)


class FloatShards:
    """Float's answers for the validation shards, each evaluated when it is first asked for."""

    def __init__(self, shared: SharedStages, reference: FileRefs) -> None:
        self._shared, self._measure = shared, _float_evaluator(shared, reference)

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
    measure, out_of = _evaluator(shared, file.file, file.runtime), images.stop - images.start
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


def measure_shards(
    shared: SharedStages, name: str, measure: Callable[[Ref, str], Ref]
) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    """Measure on the validation shards and on the selection shards."""
    validation, held_out = label_shards(shared.validation, name), label_shards(shared.held_out, f"{name}-held_out")
    found = together(shared.run, [partial(measure, shard, label) for shard, label in validation + held_out])
    num_validation = len(validation)
    return found[:num_validation], found[num_validation:] or found


def _measure_held_out(shared: SharedStages, name: str, measure: Callable[[Ref, str], Ref]) -> tuple[Ref, ...]:
    shards = label_shards(shared.held_out, f"{name}-held_out")
    return together(shared.run, [partial(measure, shard, label) for shard, label in shards])


def label_shards(shards: Sequence[Ref], name: str) -> list[tuple[Ref, str]]:
    """Each shard with a name for its task run, numbered if there is more than one."""
    return [(shard, shard_label(name, n, len(shards))) for n, shard in enumerate(shards)]


def shard_label(name: str, number: int, num_shards: int) -> str:
    """The name of a shard's task run."""
    return f"{name}-{number}" if num_shards > 1 else name
