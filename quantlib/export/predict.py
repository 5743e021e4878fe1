"""The likeliest classes of images: python predict.py IMAGE... Needs numpy, Pillow, a runtime that model.json names."""

import json
import os
import sys
from importlib import import_module, util
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MODEL = json.loads(Path(__file__).with_name("model.json").read_text(encoding="utf-8"))


def prepare(path: str) -> np.ndarray:
    """An image file as a batch of one, as `interface` in model.json says; 16 bits per pixel become 8."""
    how, end, (_, height, width) = MODEL["preprocessing"], MODEL["interface"], MODEL["input_size"]
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)) if image.mode[0] in "IF" else image
    image = image.convert("RGB").convert(how["channel_order"])
    resampling, (*other, side) = Image.Resampling[how["interpolation"].upper()], how["resize"]
    size = [side, *other] if other else [side * each // min(image.size) for each in image.size]
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    if not other and max(size) > 8 * min(size):  # Too long to be resized as a whole.
        x, y = image.width / size[0], image.height / size[1]
        image = image.resize((width, height), resampling, (left * x, top * y, (left + width) * x, (top + height) * y))
    else:
        image = image.resize(size, resampling).crop((left, top, left + width, top + height))
    x = np.asarray(image, "float32" if end["input"] == "float" else "uint8").reshape(1, height, width, -1)
    x = (x / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"]) if end["input"] == "float" else x
    return x if end["layout"] == "nhwc" else x.transpose(0, 3, 1, 2)


def answer(x: np.ndarray) -> np.ndarray:
    """Logits or probabilities [N, classes] of inputs [N, ...], from the first file whose runtime is installed."""
    os.environ["ORT_DISABLE_TELEMETRY"], sys.modules["openvino_telemetry"] = "1", None  # type: ignore[assignment]
    for file in MODEL["files"]:
        name, _, engine = file["runtime"].partition("-")  # executorch is for phones.
        if name != "executorch" and util.find_spec(package := "torch" if name.startswith("torch") else name):
            path, lib = str(Path(__file__).with_name(file["name"])), import_module(package)
            if name == "onnxruntime":
                return lib.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": x})[0]
            if name == "openvino":
                return lib.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
            images = lib.from_numpy(x).contiguous(memory_format=lib.channels_last)
            if name == "torch_export":
                import_module("torch.ao.quantization.fx._decomposed")  # Registers the operations that round.
                return lib.export.load(path).module()(images).detach().numpy()
            lib.backends.quantized.engine = engine or lib.backends.quantized.engine
            return lib.jit.optimize_for_inference(lib.jit.load(path).eval())(images).detach().numpy()
    sys.exit(f"Install the runtime of one of the files: {', '.join(file['runtime'] for file in MODEL['files'])}.")


if __name__ == "__main__":
    sys.tracebacklimit, paths = 0, sys.argv[1:] or sys.exit(__doc__)  # An error is one line.
    for path, scores in zip(paths, answer(np.concatenate([prepare(path) for path in paths])), strict=True):
        p = scores if MODEL["interface"]["softmax"] else np.exp(scores - scores.max())
        best = (f"{p[n] / p.sum():8.2%}  {MODEL['classes'][n]}" for n in np.argsort(-scores, kind="stable")[:5])
        print(path, *best, sep="\n")
