"""What a shipped file says about itself: one JSON document, inside the file and in a bundle's model.json.

An ONNX file holds it as metadata "quantflow", OpenVINO IR as runtime information "framework", "quantflow"; files of
TorchScript and torch.export as extra file "quantflow.json"; those of ExecuTorch as a file of that name in a ZIP archive
at their end. It is added when a file leaves the store: an artifact is named by its content, and is written before
anything of it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from quantlib.data.normalization import Normalization
from quantlib.data.transforms import EvalTransform
from quantlib.errors import MachineError, ModelError, reason_of
from quantlib.export import checksums
from quantlib.files import read_file
from quantlib.recipe.fields import Count, Fraction, Pixels
from quantlib.recipe.interface import FLOAT, Interface
from quantlib.recipe.sections import Interpolation

SCHEMA_VERSION = 2
"""Raised when a reader of the previous version would misunderstand a document; new fields alone do not raise it.

1: the file takes normalized float32 images and gives logits. 2: `interface` says what it takes and gives.
"""

DOCUMENT = "model.json"
"""The document of a bundle."""

_KEY, _EXTRA_FILE = "quantflow", "quantflow.json"
IR_KEYS = ["framework", _KEY]
"""Where OpenVINO keeps the metadata "quantflow" of an ONNX file that it converts."""

_AGAIN = "Copy it again, or write it again with `quantflow resume RUN` or `quantflow export RUN`."

_Positive = Annotated[float, Field(gt=0.0)]
# A longer path could lead out of the bundle.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.(pt|pt2|pte|onnx|xml)$", max_length=255)]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the model's input, [channels, height, width] float32.

    The image is converted to `channel_order`, resized by Pillow, cropped around its centre, divided by 255, and
    normalized: (x - mean) / std for each channel.
    """

    channel_order: Annotated[str, Field(pattern="^(RGB|L)$")]
    """RGB, or L: one channel of grey, as Pillow converts RGB to it."""
    resize: Annotated[list[Pixels], Field(min_length=1, max_length=2)]
    """Pixels: [the shorter side], and the longer one rounded down; or [height, width]."""
    crop: Annotated[list[Pixels], Field(min_length=2, max_length=2)]
    """[height, width] of the centre crop, in pixels: that of the model's input."""
    interpolation: Annotated[str, Field(pattern="^(nearest|bilinear|bicubic|lanczos)$")]
    """Pillow's name of the filter."""
    antialias: bool
    """Whether the filter is widened where it shrinks an image, as Pillow's always are; nearest has no width."""
    mean: list[float]
    """Mean of each channel, for pixels in [0, 1]."""
    std: list[_Positive]
    """Standard deviation of each channel, for pixels in [0, 1]."""

    @property
    def input_size(self) -> list[int]:
        """[channels, height, width] of the model's input."""
        return [3 if self.channel_order == "RGB" else 1, *self.crop]

    @property
    def text(self) -> str:
        """The same as one sentence."""
        color, side = "RGB" if self.channel_order == "RGB" else "grey", "shorter side " * (len(self.resize) == 1)
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{color}, {side}resized to {_by(self.resize)} pixels "
            f"({self.interpolation}{', antialiased' if self.antialias else ''}), centre crop of {_by(self.crop)}, "
            f"divided by 255, mean {mean}, standard deviation {std}."
        )

    @classmethod
    def of(cls, transform: EvalTransform) -> Preprocessing:
        """The preprocessing that a transform and its normalization do."""
        return cls(
            channel_order="RGB" if transform.normalization.num_channels == 3 else "L",
            resize=[transform.resize] if isinstance(transform.resize, int) else list(transform.resize),
            crop=list(transform.crop),
            interpolation=transform.interpolation,
            antialias=transform.interpolation != "nearest",
            mean=list(transform.normalization.mean),
            std=list(transform.normalization.std),
        )

    def transform(self) -> EvalTransform:
        """The transform that does it, with its normalization."""
        return EvalTransform(
            resize=self.resize[0] if len(self.resize) == 1 else (self.resize[0], self.resize[1]),
            crop=(self.crop[0], self.crop[1]),
            interpolation=cast("Interpolation", self.interpolation),
            normalization=Normalization(tuple(self.mean), tuple(self.std)),
        )


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


class _Part(BaseModel):
    """A part of the document. What it does not know, a later release has added, and it does without."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Accuracy(_Part):
    """Top-1 on validation images."""

    top1: Fraction
    top1_low: float
    """Ends of its 95% interval (Wilson)."""
    top1_high: float
    num_images: Count


class Measured(_Part):
    """What was measured of a file, in its runtime."""

    accuracy: Accuracy
    top1_drop: float
    """Float's top-1 minus this one's, on the same images."""
    top1_drop_low: float
    """Ends of its 95% interval."""
    top1_drop_high: float
    latency_p50_ms: _Positive
    """Median for a batch of one image on one thread of `cpu_model`."""


class FileInfo(_Part):
    """A file, in the runtime that it is meant for."""

    name: _FileName
    """As it was written; it may have been renamed."""
    runtime: Annotated[str, Field(pattern=r"^(torchscript(-[a-z0-9]+)?|onnxruntime|openvino|executorch|torch_export)$")]
    """What `quantlib.api.load` takes as `runtime`: torchscript (float), torchscript-ENGINE, onnxruntime, openvino,
    executorch or torch_export."""
    runtime_version: str
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the file as it was before this document was added: the report's `artifact_sha256`."""
    verdict: str
    """winner, accepted, baseline (float), or why it is not accepted: outside, slower, undecided or unavailable."""
    measured: Measured | None
    """null if the recipe does not ship files for this runtime."""

    @property
    def is_accepted(self) -> bool:
        """Whether the run's gate let it be shipped."""
        return self.verdict in {"winner", "accepted"}


class ModelInfo(_Part):
    """A model: what it says, what it takes, and how accurate and fast it was where it was made."""

    schema_version: int
    run_id: str
    variant: str
    method: Annotated[str, Field(pattern="^(float|ptq|qat)$")]
    recipe: dict[str, Any]
    """The recipe's tables, without what is left at its default; of paths the last part only."""
    classes: Annotated[list[str], Field(min_length=1)]
    """Names, in the order of the logits."""
    input_size: Annotated[list[Pixels], Field(min_length=3, max_length=3)]
    """Channels, height and width of the model's input."""
    interface: Interface = FLOAT
    """What the files take, for any number of images (executorch: one), and what they give."""
    preprocessing: Preprocessing
    float_accuracy: Accuracy
    """The float model's."""
    files: Annotated[list[FileInfo], Field(min_length=1)]
    """In a file: itself. In model.json: the files of the bundle, the best first."""
    cpu_model: str
    """Where everything was measured."""
    torch_version: str
    quantflow_version: str

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        prepared = self.preprocessing
        num_channels = {self.input_size[0], len(prepared.mean), len(prepared.std)}
        if self.input_size != prepared.input_size or len(num_channels) > 1:
            raise ValueError("input_size, crop, channel_order, mean and std do not fit together")
        return self


def document(info: ModelInfo) -> bytes:
    """The document: JSON, as `read` takes it."""
    return info.model_dump_json(indent=1).encode()


def attach(content: bytes, kind: str, info: ModelInfo) -> bytes:
    """A file with its document inside; it answers as it does without.

    Args:
        content: The file without a document.
        kind: torchscript, onnx, executorch or torch_export.
        info: What the document says.
    """
    if kind == "executorch":
        from quantlib.export import executorch

        return executorch.add_file(content, _EXTRA_FILE, document(info))
    if kind != "onnx":
        from quantlib.export import archive  # It imports torch.

        return archive.add_extra_file(content, _EXTRA_FILE, document(info))
    import onnx

    entry = onnx.StringStringEntryProto(key=_KEY, value=document(info).decode())
    # Messages of Protocol Buffers are merged by putting one behind the other: the model need not be parsed.
    return content + bytes(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def read(path: Path) -> ModelInfo:
    """The document of a file, or of a bundle.

    Args:
        path: NAME.pt, NAME.pt2, NAME.pte, NAME.onnx, NAME.xml or model.json.

    Raises:
        ModelError: If there is none, it is damaged, or a newer quantflow wrote it.
        MachineError: If reading it needs the package onnx or openvino, which is not installed.
    """
    find: Callable[[bytes, Path], bytes | None] | None = {
        ".json": lambda content, _: content,
        ".pt": _find_in_archive,
        ".pt2": _find_in_archive,
        ".pte": _find_in_executorch,
        ".onnx": _find_in_onnx,
        ".xml": _find_in_ir,
    }.get(path.suffix)
    if find is None:
        raise ModelError(f"{path} is no model: give a bundle's folder, or a file of it or of a run.")
    checksums.verify(path)
    try:
        content = find(read_file(path), path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Give a bundle's folder, or a file of it.") from None
    if content is None:
        raise ModelError(
            f"{path} has no quantflow document: it does not say what it is. If a run wrote it, `quantflow resume RUN` "
            "writes it again, with its document."
        )
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> ModelInfo:
    try:
        fields = from_json(content, allow_inf_nan=False)
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ModelError(
                f"{path} was written by a newer quantflow: its document has schema {version}, and this quantflow reads "
                f"schemas up to {SCHEMA_VERSION}. Upgrade quantflow."
            )
        return ModelInfo.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    except ValueError as error:
        reason = str(error)
    raise ModelError(f"The quantflow document of {path} is damaged ({reason}). {_AGAIN}")


def _find_in_archive(content: bytes, path: Path) -> bytes | None:
    from quantlib.export import archive

    try:
        return archive.find_extra_file(content, _EXTRA_FILE)
    except RuntimeError as error:
        raise ModelError(f"{path} is damaged, or no file of torch's: {reason_of(error)}. {_AGAIN}") from None


def _find_in_executorch(content: bytes, _: Path) -> bytes | None:
    from quantlib.export import executorch

    return executorch.find_file(content, _EXTRA_FILE)


def _find_in_onnx(content: bytes, path: Path) -> bytes | None:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MachineError(
            f"Reading {path} needs the package onnx, which is not installed: pip install onnx."
        ) from None
    try:
        model = onnx.load_from_string(content)
    except DecodeError:
        raise ModelError(f"{path} is damaged, or no ONNX file. {_AGAIN}") from None
    return next((entry.value.encode() for entry in model.metadata_props if entry.key == _KEY), None)


def _find_in_ir(_: bytes, path: Path) -> bytes | None:
    from quantlib.runtimes import classifiers  # It imports torch.

    try:
        openvino = classifiers.import_openvino()
    except ImportError:
        raise MachineError(
            f"Reading {path} needs the package openvino, which is not installed: pip install openvino."
        ) from None
    try:
        model = openvino.Core().read_model(str(path))
    except RuntimeError:
        raise ModelError(f"{path} is damaged, or no OpenVINO IR with its .bin file beside it. {_AGAIN}") from None
    return str(model.get_rt_info(IR_KEYS).value).encode() if model.has_rt_info(IR_KEYS) else None
