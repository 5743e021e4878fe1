"""The likeliest classes of images: python predict.py IMAGE... Needs numpy, Pillow, a runtime that model.json names."""

import json
import os
import sys
from importlib import import_module, util
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MODEL = json.loads(Path(__file__).with_name("model.json").read_text(encoding="utf-8"))
END = MODEL["interface"]


def prepare(path: str) -> np.ndarray:
    """An image file as a batch of one for the model, as `interface` in model.json says."""
    how, (_, height, width) = MODEL["preprocessing"], MODEL["input_size"]
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # 16 bits per pixel; a TypeError for floating-point numbers.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB").convert(how["channel_order"])
    size, resampling = how["resize"][::-1], Image.Resampling[how["interpolation"].upper()]
    if len(how["resize"]) == 1:  # The shorter side.
        size = [size[0] * side // min(image.size) for side in image.size]
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    box = left, top, left + width, top + height
    if len(how["resize"]) == 1 and max(size) > 8 * min(size):  # Too long to be resized as a whole.
        x, y = image.width / size[0], image.height / size[1]
        image = image.resize((width, height), resampling, (box[0] * x, box[1] * y, box[2] * x, box[3] * y))
    else:
        image = image.resize(size, resampling).crop(box)
    x = np.asarray(image).reshape(1, height, width, -1)
    if END["input"] == "float":
        x = (x.astype(np.float32) / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
    return x if END["layout"] == "nhwc" else x.transpose(0, 3, 1, 2)


def answer(x: np.ndarray) -> np.ndarray:
    """Logits or probabilities [N, classes] of inputs [N, ...], from the first file whose runtime is installed."""
    os.environ["ORT_DISABLE_TELEMETRY"], sys.modules["openvino_telemetry"] = "1", None  # type: ignore[assignment]
    for file in MODEL["files"]:
        name, _, engine = file["runtime"].replace("torchscript", "torch").partition("-")
        if not util.find_spec(name):
            continue
        path, runtime = str(Path(__file__).with_name(file["name"])), import_module(name)
        if name == "onnxruntime":
            return runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": x})[0]
        if name == "openvino":
            return runtime.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
        runtime.backends.quantized.engine = engine or runtime.backends.quantized.engine
        script = runtime.jit.optimize_for_inference(runtime.jit.load(path).eval())
        return script(runtime.from_numpy(x).contiguous(memory_format=runtime.channels_last)).detach().numpy()
    sys.exit(f"Install the runtime of one of the files: {', '.join(file['runtime'] for file in MODEL['files'])}.")


if __name__ == "__main__":
    sys.tracebacklimit = 0  # An error is one line.
    paths = sys.argv[1:] or sys.exit(__doc__)
    for path, scores in zip(paths, answer(np.concatenate([prepare(path) for path in paths])), strict=True):
        shares = scores if END["softmax"] else np.exp(scores - scores.max())
        best = np.argsort(-scores, kind="stable")[:5]
        print(path, *(f"{shares[n] / shares.sum():8.2%}  {MODEL['classes'][n]}" for n in best), sep="\n")
