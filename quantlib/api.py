"""quantflow from Python: quantize a model without a recipe, and use an exported one.

from quantlib import api

quantized = api.quantize(model, batches)     # an nn.Module, and calibration images as it takes them
logits = quantized(images)                   # what int8 will answer, computed in float
quantized.save("model.onnx", "openvino")     # or "model.pt" for TorchScript, "model.pt2" for torch.export
classifier = api.load("model.onnx", "openvino")
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib import files, machine
from quantlib.errors import ModelError
from quantlib.export import checksums, executorch, onnx, onnx_draft, scripting, torch_export
from quantlib.graph.fusion import fuse_model
from quantlib.graph.model import trace_model
from quantlib.graph.plan import LayerPlan, draw_plan
from quantlib.measure import sensitivity
from quantlib.quantize import calibration, conversion, equalization, preparation, qat
from quantlib.quantize.bias_correction import correct_bias_on
from quantlib.recipe.scheme import ActivationBits, ObserverName, Scheme, WeightGrid
from quantlib.runtimes import available, classifiers
from quantlib.runtimes.classifiers import Classifier

__all__ = ["LayerError", "LayerPlan", "QuantizedModel", "load", "quantize"]


@dataclass(frozen=True)
class LayerError:
    """What rounding does to the output of a layer."""

    layer: str
    """Path of the convolution or linear layer, or name of a tensor that no such layer gives."""
    type: str
    """Conv2d, Linear, or the operation that gives the tensor."""
    sqnr_db: float
    """Signal-to-quantization-noise ratio in decibels, with every layer int8; inf where there is no noise."""


class QuantizedModel:
    """A quantized model: it can be called, compared with float, saved, and trained further. Made by `quantize`."""

    def __init__(
        self,
        traced: fx.GraphModule,
        calibrated: fx.GraphModule,
        quantized: fx.GraphModule,
        scheme: Scheme,
        input_shape: tuple[int, int, int],
        trainable: fx.GraphModule | None = None,
    ) -> None:
        self._traced, self._calibrated, self._quantized = traced, calibrated, quantized
        self._scheme, self._input_shape, self._trainable = scheme, input_shape, trainable

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W], prepared as the float model takes them, to logits [N, num_classes].

        int8 arithmetic is computed in float: the files give the same, up to differences in rounding.
        """
        with torch.inference_mode():
            logits: Tensor = self._quantized(images)
        return logits

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """What becomes int8, and why the rest stays float."""
        fused = fuse_model(self._traced, "eval")
        return draw_plan(fused, preparation.find_layers(fused, self._scheme.float_layers)).layers

    def compare(self, images: Tensor) -> list[LayerError]:
        """What rounding does to each layer's output, in the order of the layers, on images [N, C, H, W]."""
        found = sensitivity.compare_layers(fuse_model(self._traced, "eval"), self._quantized, images)
        return [
            LayerError(each.layer, each.type, 10 * math.log10(each.signal / each.noise) if each.noise else math.inf)
            for each in found
            if each.signal
        ]

    def save(self, path: str | Path, runtime: str | None = None) -> None:
        """Write a file for a runtime; `load` opens it.

        Args:
            path: NAME.pt for TorchScript, NAME.onnx for ONNX, NAME.pt2 for torch.export, NAME.pte for ExecuTorch.
            runtime: onnxruntime or openvino for .onnx (None: onnxruntime); torchscript or torchscript-ENGINE for .pt
                (without an engine: the one that torch prefers on this CPU); torch_export for .pt2, executorch for .pte.

        Raises:
            ModelError: If the model cannot be written in this format, or the format is not for this runtime.
            MachineError: If this machine lacks the engine, or ExecuTorch.
        """
        path = Path(path)
        if path.suffix == ".onnx" and runtime in {None, "onnxruntime", "openvino"}:
            draft = onnx_draft.draft(fuse_model(self._traced, "eval"), self._input_shape)
            content = onnx.write_onnx(draft, self._quantized, runtime or "onnxruntime")
        elif path.suffix == ".pt" and (runtime in {None, "torchscript"} or str(runtime).startswith("torchscript-")):
            engine = (runtime or "").partition("-")[2] or available.default_engine()
            content = scripting.script(self._quantized, engine, self._input_shape)
            scripting.try_out(content, engine, self._input_shape)
        elif path.suffix == ".pt2" and runtime in {None, "torch_export"}:
            content = torch_export.write(self._quantized, self._input_shape)
        elif path.suffix == ".pte" and runtime in {None, "executorch"}:
            content = executorch.write(self._quantized, self._input_shape)
        else:
            raise ModelError(
                f"{path.name!r} is not a file for {runtime or 'any runtime'}: NAME.pt is for torchscript-ENGINE, "
                "NAME.onnx for onnxruntime and openvino, NAME.pt2 for torch_export, NAME.pte for executorch."
            )
        files.write_atomically(path, content)

    def trainable(self) -> nn.Module:
        """A model for quantization-aware training that starts where this one is, in training mode.

        Train it with any optimizer and loss; then `trained` makes a quantized model of it. Freeze BatchNorm with
        `quantlib.graph.fusion.freeze_batch_norm`, as its statistics of small batches are poor.
        """
        if self._trainable is not None:
            return copy.deepcopy(self._trainable).train()
        return qat.start_from(fuse_model(self._traced, "qat"), self._calibrated, self._scheme)

    def trained(self, model: nn.Module) -> QuantizedModel:
        """The quantized model of what `trainable` returned, now trained.

        Raises:
            ModelError: If it is another model.
        """
        own = self._quantized
        if not isinstance(model, fx.GraphModule) or (
            preparation.quantizers(model).keys() != preparation.quantizers(own).keys()
            or preparation.int8_layers(model) != preparation.int8_layers(own)
        ):
            raise ModelError("trained() takes what trainable() returned, and got another model.")
        quantized = conversion.convert(model, self._scheme)
        return QuantizedModel(
            self._traced, self._calibrated, quantized, self._scheme, self._input_shape, copy.deepcopy(model)
        )


def quantize(
    model: nn.Module,
    images: Iterable[Tensor | Sequence[Any]],
    *,
    observer: ObserverName = "mse",
    weights: WeightGrid = "per_channel",
    activation_bits: ActivationBits | None = None,
    equalize: bool = False,
    smoothing: float | None = 0.5,
    bias_correction: bool = True,
    float_layers: Sequence[str] = (),
) -> QuantizedModel:
    """Quantize a trained classifier after training; the recipe's `[[ptq]]` does the same.

    Args:
        model: As it is; it is not changed.
        images: Batches [N, C, H, W] of calibration images, prepared as the model takes them; or batches of a
            DataLoader, whose first part is taken. A few hundred images of the training set are enough.
        observer: How activation ranges are found: minmax, moving_average, histogram, percentile or mse.
        weights: per_channel or per_tensor.
        activation_bits: 7 or 8; None: as many as the int8 arithmetic of this CPU takes.
        equalize: Rescale channels from layer to layer, so that their weights have the same range; serves per_tensor.
        smoothing: Rescale channels from layer to layer and from norms to layers, so that one scale suits the values of
            all channels: SmoothQuant's alpha, how much of their ranges goes over to the weights; None: they stay.
        bias_correction: Correct each layer's mean output, on the first batches.
        float_layers: Layers that stay float, by path or class.

    Raises:
        ModelError: If the model has nothing to quantize, its answers are not always the same, or it has none of the
            `float_layers`.
    """
    batches = [_images_of(batch) for batch in images]
    if not batches or len({x.shape[1:] for x in batches}) > 1:
        raise ModelError(f"quantize() got {len(batches)} batches: it needs one at least, and images of one size.")
    _, channels, height, width = batches[0].shape
    input_shape = (channels, height, width)
    scheme = Scheme(
        observer=observer,
        weights=weights,
        activation_bits=activation_bits or available.activation_bits(available.default_engine()),
        float_layers=(float_layers,) if isinstance(float_layers, str) else tuple(float_layers),
    )
    traced = trace_model(copy.deepcopy(model).eval(), input_shape)
    if equalize:
        traced = equalization.equalize(traced, input_shape)
    if smoothing is not None:
        traced = equalization.smooth(traced, input_shape, smoothing, calibration.first_images(batches))
    observed = preparation.observe(fuse_model(traced, "eval"), scheme.float_layers, inplace=True)
    calibration.show(observed, batches, sum(map(len, batches)))
    calibration.choose_ranges(observed, scheme)
    if bias_correction:
        observed = correct_bias_on(observed, scheme, calibration.first_images(batches))
    return QuantizedModel(traced, observed, conversion.convert(observed, scheme), scheme, input_shape)


def _images_of(batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor) or x.dim() != 4 or len(x) == 0 or x.dtype != torch.float32:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ModelError(f"quantize() needs batches of calibration images, float32 [N, C, H, W], and got {got}.")
    return x


def load(path: str | Path, runtime: str | None = None, num_threads: int | None = None) -> Classifier:
    """Load an exported model, with the fastest settings for this machine; call it with images as it takes them.

    The process's memory allocator is set to keep freed memory, which makes float models several times faster.

    Args:
        path: A file of a run or of a bundle: NAME.pt, NAME.pt2, NAME.pte, NAME.onnx or NAME.xml.
        runtime: As the report names it: torchscript, torchscript-ENGINE, onnxruntime, openvino, executorch or
            torch_export; None:
            the one that the file is for, and of those for an .onnx file an installed one.
        num_threads: None: as many as the runtime likes. With torchscript and torch_export this is torch's own setting,
            for the process.

    Raises:
        ModelError: If there is no such file, it does not match the SHA256SUMS beside it, or it does not run in that
            runtime.
        MachineError: If the runtime is not installed, or this machine lacks the engine.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"No file {str(path)!r}: give one that a run's report names.")
    checksums.verify(path)
    machine.keep_freed_memory()
    if runtime is None:
        installed = [found.name for found in available.find_runtimes()]
        own = {".pt": "torchscript", ".pt2": "torch_export", ".pte": "executorch", ".xml": "openvino"}
        runtime = own.get(path.suffix, (installed or ["openvino"])[0])
    if num_threads is not None and available.package_of(runtime) == "torch":
        torch.set_num_threads(num_threads)
    return classifiers.open_model(path, runtime, num_threads or 0)
