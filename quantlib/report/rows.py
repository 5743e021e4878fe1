"""The rows of the report's tables, and what is derived from each.

`variants` and `stages` are a contract with outside readers: columns are added, never renamed.
"""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """The float model, or one quantized model: one file, in the runtime that the file is meant for.

    Accuracy, size, latency and verdict all refer to that file (`artifact_path`) in that runtime (`runtime`); the table
    `files` has the others. Float's accuracy is TorchScript's, which every drop is measured from; its latency is that of
    its fastest file.
    """

    # A column with a default was added to the table later: it is null in runs reported before that.
    recipe: str
    """The recipe's name."""
    variant: str
    """The branch's name; float for the baseline."""
    method: str
    """float, ptq or qat."""
    qconfig: str | None
    """The recipe's `qconfig`; null for float."""
    engine: str | None
    """torch's int8 engine of the TorchScript file; null for float."""
    observer: str | None = None
    """How activation ranges were found; null for float, like the next three."""
    weights: str | None = None
    """per_tensor or per_channel."""
    activation_bits: int | None = None
    """7 or 8; 8 bits saturate on an x86 CPU without VNNI."""
    float_layers: list[str] | None = None
    """What was kept in float, as the recipe names it."""
    int8_share: float | None = None
    """Fraction of the multiply-adds that are int8; null for float."""
    equalized: bool | None = None
    """Whether cross-layer equalization was applied; null for float."""
    smoothing: float | None = None
    """SmoothQuant's alpha; null: channels were not smoothed."""
    bias_corrected: bool | None = None
    """Whether biases were corrected; null for float."""
    top1: float
    """Fraction of the validation images, like the other accuracies unless noted."""
    top5: float
    """Fraction of the validation images whose label is among the five likeliest classes."""
    loss: float
    """Mean cross-entropy in nats."""
    num_images: int
    """Validation images that were evaluated."""
    top1_drop: float
    """Float's top1 minus this one's."""
    top1_drop_low: float | None = None
    """Ends of the 95% interval of the drop, image by image on the same images. Where evaluation ended early, one that
    holds however often one looks, like the p-value then."""
    top1_drop_high: float | None = None
    """See `top1_drop_low`."""
    p_value: float | None = None
    """Exact McNemar test: how likely it is that a model as accurate as float differs by this much or more."""
    num_images_available: int | None = None
    """Validation images that there were, if evaluation ended once the verdict was certain (`evaluation.stop`). Null:
    all were evaluated."""
    certain_low: float | None = None
    """Ends of the interval of the drop that this was decided by, which holds however often one looks: on all validation
    images, with 95% confidence; with `gate.confidence`, on all images like these, with that one."""
    certain_high: float | None = None
    """See `certain_low`."""
    top1_selection: float
    """On the selection images."""
    selected_on: str
    """Where those come from: held_out (training images) or validation."""
    top1_simulated: float | None
    """With fake quantization in float, of weights and activations."""
    top1_weights_only: float | None
    """Like `top1_simulated`, of weights alone."""
    top1_activations_only: float | None
    """Like `top1_simulated`, of activations alone."""
    best_epoch: int | None
    """The QAT epoch that this is, 0-based; null where QAT kept its start."""
    top1_start: float | None = None
    """Top-1 of the int8 model that QAT started from."""
    kept_start: bool | None = None
    """Whether no epoch of QAT was better than its start, on the selection images: then this is the start."""
    size_bytes: int
    """Size of the model: the file that is handed out also holds its document."""
    runtime: str | None = None
    """What `quantlib.api.load` takes as `runtime`: torchscript (float), torchscript-ENGINE, onnxruntime, openvino,
    executorch or torch_export. Null in older runs: TorchScript on `engine`."""
    latency_p50_ms: float
    """A batch of one image, one thread."""
    speedup: float
    """Float's latency_p50_ms over this one's."""
    fastest_runtime: str | None = None
    """The fastest of this machine's runtimes for one image on one thread, whatever the accuracy there."""
    fastest_p50_ms: float | None = None
    """Milliseconds for one image on one thread there."""
    accepted: bool
    """Inside the gate."""
    gate: str | None = None
    """inside, outside, slower (than float, though accurate enough), undecided (too few images to say with the
    confidence that the recipe asks for), or unavailable (no file for a runtime that the recipe allows)."""
    num_images_to_decide: int | None = None
    """About how many images would decide an undecided variant."""
    winner: bool
    """Whether this is the model to ship; at most one per run."""
    reason: str | None = None
    """Why the winner was chosen; null for the others."""
    pareto: bool | None = None
    """Whether nothing inside the gate beats it beyond noise, by being faster and as accurate, or as fast and more
    accurate, on the selection images. Null if it is not inside."""
    artifact_sha256: str
    """Hash of the model, which does not depend on the run: SHA256SUMS has the hash of the file at `artifact_path`,
    which also holds its document, with this hash in it."""
    artifact_path: str
    """Path of the file that this row is about."""
    torchscript_path: str | None = None
    """Path of the TorchScript file, if there is one."""
    torchscript_refusal: str | None = None
    """Why there is no TorchScript file."""
    onnx_path: str | None = None
    """Path of the ONNX file, the fastest if runtimes have one each; null where no runtime for ONNX is installed."""
    onnx_top1: float | None = None
    """Top-1 of the ONNX file in its fastest runtime; the table `files` says which."""
    onnx_refusal: str | None = None
    """Why there is no ONNX file, where there could be one."""
    other_refusal: str | None = None
    """Why there is no file for executorch or torch_export, where the recipe names them."""
    torch_version: str
    """Version of torch that the run used."""
    cpu_model: str
    """The CPU that everything was measured on."""
    created_at: datetime
    """When the report was written."""

    @property
    def verdict(self) -> str:
        """baseline, winner, accepted, or why it is not accepted."""
        if self.method == "float":
            return "baseline"
        return "winner" if self.winner else "accepted" if self.accepted else self.gate or "outside"

    @property
    def change(self) -> str:
        """Change of top-1 against float, in points, such as "-0.50"."""
        return points(-self.top1_drop)

    @property
    def interval(self) -> str:
        """The 95% interval of the change, such as "-1.10 to +0.10"; empty in old reports."""
        if self.top1_drop_low is None or self.top1_drop_high is None:
            return ""
        return f"{points(-self.top1_drop_high)} to {points(-self.top1_drop_low)}"

    @property
    def evidence(self) -> str:
        """How sure the change is, such as "95% interval -1.10 to +0.10, p = 0.25"; empty in old reports."""
        return f"95% interval {self.interval}, p = {self.p_value:.2g}" if self.p_value is not None else ""

    @property
    def load(self) -> str:
        """How Python opens the file in its runtime."""
        if self.runtime is None:
            return f'torch.jit.load("{self.artifact_path}")'
        return f'quantlib.api.load("{self.artifact_path}", "{self.runtime}")'

    @property
    def title(self) -> str:
        """The variant's name, and which of QAT's candidates it is."""
        if self.kept_start:
            return f"{self.variant} (start)"
        return self.variant if self.best_epoch is None else f"{self.variant} (epoch {self.best_epoch})"


@dataclass(frozen=True, kw_only=True)
class FileRow:
    """A file of a variant in the runtime that it is fastest in: what may be shipped, and what the gate judges."""

    variant: str
    """The branch's name."""
    path: str
    """Where it is."""
    sha256: str
    """Hash of the model, like the variant's `artifact_sha256`."""
    size_bytes: int
    """Size of the model, like the variant's."""
    runtime: str
    """torchscript-ENGINE, onnxruntime, openvino, executorch or torch_export."""
    top1: float
    """Fraction of the validation images."""
    top1_drop: float
    """Float's top1 minus this one's."""
    top1_drop_low: float
    """Ends of the 95% interval of the drop, image by image on the same images."""
    top1_drop_high: float
    """See `top1_drop_low`."""
    p_value: float
    """Exact McNemar test against float."""
    top1_selection: float
    """On the selection images."""
    num_images: int | None = None
    """Validation images that were evaluated; null in older runs, like the next three."""
    num_images_available: int | None = None
    """Like the variant's, as the next two are."""
    certain_low: float | None = None
    """See the variant's."""
    certain_high: float | None = None
    """See the variant's."""
    latency_p50_ms: float
    """A batch of one image, one thread."""
    speedup: float
    """Against float in its fastest runtime that the recipe allows."""
    gate: str
    """inside, outside, slower or undecided."""
    num_images_to_decide: int | None
    """About how many images would decide an undecided file."""
    reported: bool
    """Whether the variant's row is about this file."""


@dataclass(frozen=True, kw_only=True)
class NoteRow:
    """Something to know about the run, in one sentence."""

    kind: str
    """warning: the figures may mislead; regression: the gate against regressions has found one; note: the rest."""
    text: str
    """The sentence."""


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """An epoch of quantization-aware training."""

    variant: str
    """The [[qat]] branch's name."""
    epoch: int
    """Counted from 0."""
    loss: float
    """Mean over the epoch's training images, in nats: cross-entropy with the labels, or with `distill` the
    Kullback-Leibler divergence from the float model."""
    train_top1: float
    """Top-1 on the epoch's training images, cropped at random as they were trained on."""
    top1: float
    """Top-1 of the converted int8 model on the validation images."""
    top1_selection: float
    """Top-1 on the selection images, which decide the best epoch."""
    best: bool
    """Whether this epoch's model is the branch's variant."""
    observers_frozen: bool
    """Whether activation ranges were fixed from the end of this epoch on, if not before."""
    batch_norm_frozen: bool
    """Whether BatchNorm's statistics were fixed from the end of this epoch on, if not before."""


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """One model's timing for one batch size and number of threads."""

    variant: str
    """The branch's name; float for the baseline."""
    runtime: str
    """torchscript (float), torchscript-ENGINE, onnxruntime, openvino, executorch or torch_export."""
    batch_size: int
    """Images per call."""
    num_threads: int
    """Threads that the runtime computed with."""
    p50_ms: float
    """Median time of a call, that is, of a whole batch."""
    p95_ms: float
    """95th percentile of a call's time."""
    images_per_second: float
    """`batch_size` over the median time."""
    num_samples: int
    """Timed calls."""
    samples_ms: list[float] | None = None
    """Every call's time, by round: all that was timed in this setting took part in the same rounds. Null in runs
    reported before it was added."""


@dataclass(frozen=True, kw_only=True)
class PredictionRow:
    """One model's answer for one validation image."""

    variant: str
    """The branch's name; float for the baseline."""
    image_index: int
    """Its place among the images that were evaluated: in the dataset's order, or as `evaluation.max_images` drew it."""
    image: str | None
    """Its file, relative to the dataset's folder, or its number in a dataset that has no files; absent if the dataset
    was changed before the run was over."""
    label: int
    """The image's class, as an index into the table `classes`."""
    top5: list[int]
    """The five likeliest classes, the likeliest first; fewer if there are fewer."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class of the dataset."""

    class_index: int
    """The number that stands for the class in labels and answers."""
    name: str
    """As the dataset calls it."""


@dataclass(frozen=True)
class StageRow:
    """One stage of the run."""

    stage: str
    """The task run's name, such as calibrate-per_channel."""
    key: str
    """The key that its outputs are stored under."""
    cached: bool
    """Whether an earlier run's outputs were reused."""
    seconds: float
    """Wall-clock time that this run spent on it."""
    started_at: datetime
    """When this run came to it."""


def points(change: float) -> str:
    """A signed change of a fraction, in points; never minus zero."""
    return f"{round(100 * change, 2) + 0.0:+.2f}"
