"""Makes a model of the graph that `torch.export` wrote: operations as functions, parameters under their own names."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from quantlib.errors import ModelError, reason_of
from quantlib.models.aten import add_operation, add_rounding
from quantlib.models.exported_batch import AnyBatch, refusal

# As torch/_export/serde/schema.py numbers them.
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("as_int", "as_ints", "as_bool", "as_bools", "as_string"), lambda value: value),
    # Everything is a plain tensor on the CPU.
    **dict.fromkeys(("as_none", "as_layout", "as_device"), lambda _: None),
    # JSON has no infinity: it is written as a string.
    "as_float": float,
    "as_floats": lambda values: [float(value) for value in values],
    "as_scalar_type": DTYPES.__getitem__,
    "as_memory_format": _MEMORY_FORMATS.__getitem__,
}
_BY_NAME = {"as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float", "as_optional_tensor"}
_BATCH = "batch"
_NUM_IMAGES = 3


def build(program: str, *, quantized: bool = False) -> fx.GraphModule:
    """A model of an exported graph, in eval mode, its parameters and buffers all zero.

    Args:
        program: What `exported_file.read_program` returned.
        quantized: Whether it may round, by the operations of `quantized_decomposed`.

    Raises:
        ModelError: If it is not a classifier of images alone, or does something that is not supported.
    """
    try:
        return _Builder(json.loads(program), quantized=quantized).build()
    except (AttributeError, IndexError, KeyError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ModelError(f"The exported model cannot be understood ({reason}). Export it again.") from None


def image_size(program: str) -> tuple[int | None, int | None]:
    """Height and width of the images that an exported graph takes; None for one that may vary.

    Args:
        program: What `exported_file.read_program` returned.

    Raises:
        ModelError: If it does not take images alone.
    """
    return _Builder(json.loads(program)).image_size


def check_batch(model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Check that a model gives the same answer about an image, whatever it is together with.

    torch.export has checked that, unless the model was exported for a fixed number of images.

    Args:
        model: Its parameters are loaded; if `build` did not make it, nothing is checked.
        input_shape: Channels, height and width of its input.

    Raises:
        ModelError: If it does not.
    """
    batch = model.meta.get(_BATCH) if isinstance(model, fx.GraphModule) else None
    if batch is None:
        return
    x = torch.rand(_NUM_IMAGES, *input_shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.inference_mode():
        together, alone = model(x.clone()), torch.cat([model(image.clone()) for image in x.split(1)])
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4 * max(1.0, float(alone.abs().max()))):
        raise refusal(batch, "what it answers about an image depends on the others")


class _Builder:
    """Turns the nodes of a file into those of a graph, one by one."""

    def __init__(self, program: Mapping[str, Any], *, quantized: bool = False) -> None:
        self._quantized = quantized
        self._saved, self._signature = program["graph"], program["signature"]
        self._sizes = {
            name: tuple(size.get("as_int") for size in meta["sizes"])
            for name, meta in self._saved["tensor_values"].items()
        }
        self._graph, self._root = fx.Graph(), nn.Module()
        self._values: dict[str, Any] = {}
        self._image = self._find_image()
        self._batch: int | None = self._sizes[self._image][0]  # None: it was exported for any number of images.
        self._any_batch = None if self._batch is None else AnyBatch(self._batch, self._root, self._sizes[self._image])

    @property
    def image_size(self) -> tuple[int | None, int | None]:
        """Height and width of its images."""
        _, _, height, width = self._sizes[self._image]
        return height, width

    def build(self) -> fx.GraphModule:
        """The model."""
        x = self._graph.placeholder("x")
        self._name(self._image, x)
        for spec in self._signature["input_specs"]:
            self._add_input(spec)
        self._check_size(x)
        for node in self._saved["nodes"]:
            self._add(node)
        logits = self._values[self._find_logits()]
        if self._any_batch is not None:
            self._any_batch.check(logits)
        self._graph.output(logits)
        for each in self._graph.nodes:
            each.meta.clear()
        model = fx.GraphModule(self._root, self._graph, "Exported").eval()
        model.meta[_BATCH] = self._batch
        return model

    def _find_image(self) -> str:
        images = [spec["user_input"]["arg"] for spec in self._signature["input_specs"] if "user_input" in spec]
        if len(images) != 1 or "as_tensor" not in images[0]:
            raise ModelError(
                f"The exported model takes {len(images)} inputs: it must take one, images [N, C, H, W]. "
                "Export a module whose forward() takes images alone."
            )
        name: str = images[0]["as_tensor"]["name"]
        if len(self._sizes[name]) != 4:
            raise ModelError(
                f"The exported model takes a tensor of {len(self._sizes[name])} dimensions: it must take images "
                "[N, C, H, W]. Export a classifier of images."
            )
        return name

    def _find_logits(self) -> str:
        outputs = [spec["user_output"]["arg"] for spec in self._signature["output_specs"] if "user_output" in spec]
        if len(outputs) != 1 or "as_tensor" not in outputs[0]:
            raise ModelError(
                f"The exported model gives {len(outputs)} outputs: it must give one, logits [N, num_classes]. "
                "Export a module whose forward() returns logits alone."
            )
        name: str = outputs[0]["as_tensor"]["name"]
        return name

    def _add_input(self, spec: Mapping[str, Any]) -> None:
        """Add a parameter, a buffer or a constant to the model."""
        ((kind, content),) = spec.items()
        if kind in {"user_input", "constant_input"}:
            return
        if kind not in {"parameter", "buffer", "tensor_constant"}:
            raise ModelError(f"The exported model holds a {kind}, which is not supported: export one of tensors alone.")
        path, name = content[f"{kind}_name"], content["arg"]["name"]
        *parents, last = path.split(".")
        # torch.fx writes a model's code: no name may be more than a name.
        if not all(re.fullmatch(r"\w+", part, re.ASCII) for part in (*parents, last)):
            raise ModelError(f"The exported model has a tensor {path!r}: names may have letters, digits, _ and dots.")
        dtype = DTYPES[self._saved["tensor_values"][name]["dtype"]]
        value = torch.zeros(self._sizes[name], dtype=dtype)
        owner = self._root
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if kind == "parameter":
            owner.register_parameter(last, nn.Parameter(value, requires_grad=dtype.is_floating_point))
        else:
            owner.register_buffer(last, value)
        self._name(name, self._graph.get_attr(path))

    def _check_size(self, x: fx.Node) -> None:
        wanted = self._sizes[self._image][1:]
        said = " x ".join("any" if size is None else str(size) for size in wanted)
        for dim, size in enumerate(wanted, start=1):
            if size is not None:
                fits = self._graph.call_function(operator.eq, (self._graph.call_method("size", (x, dim)), size))
                self._graph.call_function(torch._assert, (fits, f"it was exported for images of [{said}]"))

    def _add(self, saved: Mapping[str, Any]) -> None:
        target, outputs = saved["target"], saved["outputs"]
        given = {each["name"]: self._argument(each["arg"]) for each in saved["inputs"]}
        kind: str
        first: Any
        ((kind, first),) = outputs[0].items() if outputs else [("as_none", True)]
        outer = None
        if self._any_batch is not None and kind == "as_tensor":
            outer = self._any_batch.prepare(target.split(".")[-2], given, self._sizes[first["name"]])
        if target == "torch.ops.aten.add_.Tensor" and given["self"].op == "get_attr":
            result = given["self"]  # BatchNorm counts the batches of training.
        else:
            result = add_rounding(self._graph, target, given) if self._quantized else None
            result = add_operation(self._graph, target, given) if result is None else result
        if kind == "as_tensors":
            for place, each in enumerate(first):
                self._name(each["name"], self._graph.call_function(operator.getitem, (result, place)))
        elif kind != "as_none" and result is not None:
            self._name(first["name"] if kind == "as_tensor" else first["as_name"], result, outer)

    def _name(self, name: str, node: fx.Node, outer: int | None = None) -> None:
        self._values[name] = node
        if self._any_batch is not None:
            self._any_batch.note(node, self._sizes.get(name, ()), outer)

    def _argument(self, saved: Mapping[str, Any]) -> Any:
        ((kind, value),) = saved.items()
        if kind in _CONSTANTS:
            return _CONSTANTS[kind](value)
        if kind in _BY_NAME:
            return self._value(value)
        if kind.removesuffix("s") in _BY_NAME:
            return [self._value(each) for each in value]
        raise ModelError(f"The exported model has an argument of the kind {kind!r}, which is not supported.")

    def _value(self, saved: Mapping[str, Any]) -> Any:
        """What a name stands for, or a constant beside names."""
        if "name" in saved:
            return self._values[saved["name"]]
        ((kind, value),) = saved.items()
        if kind == "as_name":
            return self._values[value]
        if kind == "as_tensor":
            return self._values[value["name"]]
        return None if kind == "as_none" else value
