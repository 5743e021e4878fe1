"""The model card of a bundle: what the model is, how good it is, what that was measured on, and how to run it."""

from quantlib.export.bundle import Accuracy, FileInfo, ModelInfo
from quantlib.runtimes.available import package_of

_DATASETS = {
    "digits": "scikit-learn's handwritten digits, which are no image files: save one as a PNG to classify it",
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
}
_METHODS = {
    "float": "as it was trained, in float",
    "ptq": "quantized to int8 after training",
    "qat": "trained for int8 (quantization-aware training)",
}
_MAX_NAMES = 20


def write(info: ModelInfo, folder: str) -> str:
    """The card, in Markdown.

    Args:
        info: The document of the bundle.
        folder: Its name.
    """
    names = ", ".join(info.classes[:_MAX_NAMES])
    more = "" if len(info.classes) <= _MAX_NAMES else ", …"
    model = info.recipe.get("model", {})
    packages = list(dict.fromkeys(package_of(file.runtime) for file in info.files))
    return "\n".join(
        [
            f"# {info.recipe.get('name', info.variant)}: {info.variant}",
            "",
            f"An image classifier ({model.get('architecture', 'mobilenet_v2')}), {_METHODS[info.method]}. "
            f"It tells {len(info.classes)} classes apart: {names}{more}.",
            *_warnings(info),
            "",
            "## Run it",
            "",
            "```sh",
            f"pip install numpy pillow {packages[0]}"
            + (f"    # or, instead of {packages[0]}: {', '.join(packages[1:])}" if packages[1:] else ""),
            f"python {folder}/predict.py image.jpg",
            "```",
            "",
            "prints the five likeliest classes. With quantflow installed, "
            f"`quantflow predict {folder} image.jpg` does the same, for whole folders, too.",
            "",
            f"Its input: {info.preprocessing.text}",
            f"A file takes {_input(info)} and gives {'probabilities' if info.interface.softmax else 'logits'} "
            f"`[N, {len(info.classes)}]`; `model.json` has all of this for programs.",
            "",
            "## How good it is",
            "",
            "| file | runtime | images | top-1 | 95% interval | change against float | 95% interval | ms per image |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(_row, info.files),
            "",
            f"Float has {_top1(info.float_accuracy)} of top-1 ({_interval(info.float_accuracy)}) on "
            f"{info.float_accuracy.num_images:,} validation images of {_dataset(info)}; files may have seen only the "
            f"first of them. Changes are in points, on the same images. The time is the median for one image on one "
            f"thread of {info.cpu_model}.",
            "",
            "## Where it comes from",
            "",
            f"Run {info.run_id}, variant {info.variant}, quantflow {info.quantflow_version}, torch "
            f"{info.torch_version}. `model.json` has the recipe, `SHA256SUMS` the checksums of these files.",
            "",
        ]
    )


def _warnings(info: ModelInfo) -> list[str]:
    warnings = []
    if info.method != "float" and not any(file.is_accepted for file in info.files):
        warnings.append(f"**Not accepted by its run's gate: {info.files[0].verdict}.**")
    if info.recipe.get("evaluation", {}).get("select_on") == "validation":
        warnings.append("Choices were made on the validation images themselves: these accuracies are optimistic.")
    return [line for text in warnings for line in ("", text)]


def _input(info: ModelInfo) -> str:
    channels, height, width = info.input_size
    if info.interface.input == "float":
        return f"float32 `[N, {channels}, {height}, {width}]`"
    order = (height, width, channels) if info.interface.layout == "nhwc" else (channels, height, width)
    return f"uint8 `[N, {', '.join(map(str, order))}]`, the pixels before that division, which it does itself,"


def _row(file: FileInfo) -> str:
    cells = [f"`{file.name}`", f"{file.runtime} {file.runtime_version}"]
    if file.measured is None:
        return f"| {' | '.join([*cells, 'not measured', '', '', '', '', ''])} |"
    measured = file.measured
    change = ["", ""]
    if file.verdict != "baseline":
        change = [
            _points(-measured.top1_drop),
            f"{_points(-measured.top1_drop_high)} to {_points(-measured.top1_drop_low)}",
        ]
    cells += [
        f"{measured.accuracy.num_images:,}",
        _top1(measured.accuracy),
        _interval(measured.accuracy),
        *change,
        f"{measured.latency_p50_ms:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _top1(accuracy: Accuracy) -> str:
    return f"{accuracy.top1:.2%}"


def _interval(accuracy: Accuracy) -> str:
    return f"{accuracy.top1_low:.2%} to {accuracy.top1_high:.2%}"


def _points(change: float) -> str:
    return f"{round(100 * change, 2) + 0.0:+.2f}"  # Never minus zero.


def _dataset(info: ModelInfo) -> str:
    data = info.recipe.get("data", {})
    form = data.get("format", "")
    if form in {"imagefolder", "classfolders"}:
        return f"the image folder `{data.get('root', '')}`"
    return _DATASETS.get(form, f"the dataset `{form}`")
