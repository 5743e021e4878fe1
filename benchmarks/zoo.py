"""Quantizes every classifier of torchvision, and one of each of 40 families of timm, and writes docs/zoo.md.

    python benchmarks/zoo.py [--only NAME ...] [--jobs 2]

Weights are random and images are noise: it shows what becomes int8 and which files can be written, not accuracies.
Each model has a process of its own with one thread, so that one that dies is one row. All of it takes about two hours
on two cores; each row is written when it is known, and with `--only` the page keeps the rows of the other models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "zoo.md"
# One of each family, the smallest or nearly.
TIMM = """
botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny convmixer_768_32 convnext_atto
convnextv2_atto crossvit_tiny_240 cspresnet50 deit_tiny_patch16_224 dla34 dpn48b edgenext_xx_small efficientformer_l1
efficientnet_lite0 efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8 fbnetc_100 focalnet_tiny_srf gcresnet33ts
ghostnet_100 gmixer_24_224 hardcorenas_a hrnet_w18_small inception_next_atto lcnet_050 levit_128s mixer_s32_224
mnasnet_small mobilenetv4_conv_small mobileone_s0 mobilevit_xxs nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0
regnetx_002 repvgg_a0 res2net50_26w_4s resnet10t resnest14d rexnet_100 seresnet18 skresnet18 tf_efficientnet_b0
tinynet_e tresnet_m vgg11 visformer_tiny vit_tiny_patch16_224 xception41
"""
_SIZES = {"inception_v3": 96, "maxvit_t": 224, "mobilenet_v3_large": 224, "mobilenet_v3_small": 224}
_TIMEOUT = 2400


@dataclass
class Row:
    """What was found about a model."""

    name: str
    size: int
    share: float = math.nan
    """Fraction of the multiply-adds that are int8."""
    sqnr: float = math.nan
    """Signal-to-noise ratio of the logits, in decibels."""
    torchscript: str = ""
    """"yes", or why there is no file."""
    onnxruntime: str = ""
    openvino: str = ""
    repeated: bool = False
    """Whether a second build has the same plan."""
    error: str = ""


def build(name: str) -> tuple[Any, int]:
    """A model with random weights, and the side of its images."""
    library, _, own = name.partition(":")
    if library == "timm":
        import timm
        import torch

        for size, settings in ((64, {"img_size": 64}), (64, {}), (128, {})):
            with contextlib.suppress(TypeError, RuntimeError, AssertionError, ValueError):
                model = timm.create_model(own, num_classes=10, **settings).eval()
                with torch.no_grad():
                    model(torch.zeros(1, 3, size, size))
                return model, size
        model = timm.create_model(own, num_classes=10)
        return model, int(model.default_cfg["input_size"][-1])
    from torchvision import models

    size = _SIZES.get(own, 64)
    extra: dict[str, Any] = {}
    if own.startswith("vit_"):
        size = 56 if own.endswith("14") else 64
        extra = {"image_size": size}
    if own in {"googlenet", "inception_v3"}:
        extra = {"init_weights": False, "aux_logits": False}
    return models.get_model(own, num_classes=10, **extra), size


def examine(name: str) -> Row:
    """Quantize a model and write its files."""
    import torch

    from quantlib import api, process
    from quantlib.graph.model import plan_of

    process.prepare_process()
    model, size = build(name)
    plan = [(layer.path, layer.int8) for layer in plan_of(model.eval(), (3, size, size)).layers]
    torch.manual_seed(0)
    model, _ = build(name)
    row = Row(name, size)
    images = torch.randn(8, 3, size, size)
    _settle(model, images)
    # One scale for all: a random network's channels differ too much for rescaling them to be of use.
    quantized = api.quantize(model, [images], smoothing=None, bias_correction=False)
    with torch.inference_mode():
        expected = model.eval()(images)
    answers = quantized(images)
    row.sqnr = _decibels(expected, answers)
    total = sum(layer.num_multiplications for layer in quantized.layers)
    row.share = sum(layer.num_multiplications for layer in quantized.layers if layer.int8) / total
    row.repeated = plan == [(layer.path, layer.int8) for layer in quantized.layers]
    del model  # A large one takes several times its size below.
    with tempfile.TemporaryDirectory() as folder:
        for runtime, suffix in (("torchscript", "pt"), ("onnxruntime", "onnx"), ("openvino", "onnx")):
            path = Path(folder) / f"m.{suffix}"
            setattr(row, runtime, _try(lambda: _difference(quantized, images, path, runtime, row.sqnr)))  # noqa: B023
    return row


def _settle(model: Any, images: Any) -> None:
    """Give BatchNorm statistics of the images, and every parameter that starts at 0 a value."""
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" not in name and float(parameter.abs().max()) == 0:
                nn.init.normal_(parameter, std=0.1)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            model.train()
            for _ in range(3):
                model(images)
    model.eval()


def _decibels(expected: Any, got: Any) -> float:
    noise = float((expected - got).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else math.inf


def _difference(quantized: Any, images: Any, path: Path, runtime: str, sqnr: float) -> str:
    """Write a file, and compare its answers with the quantized model's.

    They round alike but not to the last bit, and a random network enlarges such differences as it does those of int8:
    the file must be nearer to the quantized model than that is to float, and near in any case where int8 is.
    """
    from quantlib import api

    quantized.save(path, runtime)
    own = _decibels(quantized(images), api.load(path, runtime)(images))
    return "yes" if own > min(sqnr, 10) else f"differs ({own:.0f} dB)"


def _try(write: Callable[[], str]) -> str:
    try:
        return write()
    except Exception as error:  # noqa: BLE001, RUF100 (whatever it is, it is the reason)
        return f"no: {' '.join(str(error).split())[:160]}"


def names() -> list[str]:
    """Every model of the table."""
    from torchvision import models

    return [
        *(f"torchvision:{name}" for name in models.list_models(module=models)),
        *(f"timm:{name}" for name in TIMM.split()),
    ]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as torchvision:resnet18")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time")
    parser.add_argument("--examine", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine:
        print(json.dumps(asdict(examine(options.examine))))
        return
    lines = _written() if options.only else {}
    order = names()
    with ThreadPoolExecutor(options.jobs) as pool:
        for ended in as_completed([pool.submit(_in_a_process, name) for name in options.only or order]):
            row = ended.result()
            lines[row.name] = _line(row)
            print(lines[row.name], flush=True)
            PAGE.write_text(page(lines, order))


def _written() -> dict[str, str]:
    """The rows of the page as it is, by model."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return {line.split(" | ")[0][2:]: line for line in lines if line.startswith(("| torchvision:", "| timm:"))}


def _in_a_process(name: str) -> Row:
    command = [sys.executable, "-W", "ignore", __file__, "--examine", name]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, cwd=ROOT, env=one_thread
        )
    except subprocess.TimeoutExpired:
        return Row(name, 0, error=f"takes more than {_TIMEOUT} s")
    try:
        return Row(**json.loads(ended.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        return Row(name, 0, error=lines[-1][:200])


def _line(row: Row) -> str:
    if row.error:
        return f"| {row.name} | | | | | | | {row.error} |"
    reasons = {each.removeprefix("no: ") for each in (row.torchscript, row.onnxruntime, row.openvino) if each != "yes"}
    files = " | ".join("yes" if each == "yes" else "no" for each in (row.torchscript, row.onnxruntime, row.openvino))
    remarks = [*([] if row.repeated else ["a second build has another plan"]), *sorted(reasons)]
    figures = f"{row.size} | {row.share:.1%} | {row.sqnr:.0f}"
    return f"| {row.name} | {figures} | {files} | {'; '.join(remarks)} |"


def page(lines: dict[str, str], order: list[str]) -> str:
    """The table as a page, and the names of the models that it lacks."""
    import torch
    import torchvision

    missing = [name for name in order if name not in lines]
    return "\n".join(
        [
            "# Which classifiers become int8",
            "",
            "Random weights, noise for images, small crops where the architecture allows: what becomes int8, and which",
            "files can be written and answer as the quantized model does. SQNR is that of the logits against float, in",
            "decibels; it says little about accuracy, which random weights do not have.",
            f"Written by `python benchmarks/zoo.py` with torch {torch.__version__.partition('+')[0]} and torchvision "
            f"{torchvision.__version__.partition('+')[0]}.",
            "",
            "| model | side | multiply-adds in int8 | SQNR | TorchScript | ONNX Runtime | OpenVINO | remarks |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(lines[name] for name in order if name in lines),
            "",
            *(["Not examined: " + ", ".join(missing) + ".", ""] if missing else []),
        ]
    )


if __name__ == "__main__":
    main()
