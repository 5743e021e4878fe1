"""A bundle: a folder with the files of one variant and everything needed to run them, whole or not at all.

NAME.pt, NAME.onnx    the files, each with its own document
NAME.xml, NAME.bin    OpenVINO IR in place of the ONNX file for OpenVINO, if asked for
model.json            the document of the bundle
predict.py            runs them with a runtime, numpy and Pillow alone
README.md             the model card
SHA256SUMS            checksums of all of it
"""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from quantlib import temporary
from quantlib.errors import ModelError, suggest
from quantlib.export import bundle, card, checksums
from quantlib.export.bundle import FileInfo, ModelInfo
from quantlib.files import read_file, write_atomically


def export(
    models: Path,
    run_id: str,
    variant: str | None,
    to: Path,
    *,
    openvino_ir: bool = False,
    with_float: bool = False,
) -> ModelInfo:
    """Write the bundle of a run's variant: its accepted files, or all of them if none is accepted.

    Args:
        models: The folder of all runs' files.
        run_id: The run.
        variant: The variant; None: the winner.
        to: The bundle's folder: a new one, or an empty one.
        openvino_ir: Whether the file for OpenVINO is written as IR, NAME.xml and NAME.bin, instead of ONNX.
        with_float: Whether the float model's ONNX file is added, as the last one.

    Returns:
        The document of the bundle.

    Raises:
        ModelError: If there is no such run, variant or file, the run has no winner, a file is damaged, or the folder
            is not empty.
        MachineError: If OpenVINO is needed and not installed.
    """
    to = to.resolve()
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ModelError(f"{to} exists and is not an empty folder: name a new one, or remove it first.")
    found = [bundle.read(path) for path in _files_of(models, run_id)]
    info, own = _choose(found, run_id, variant), models / run_id
    to.parent.mkdir(parents=True, exist_ok=True)
    with temporary.new_folder(to.parent) as scratch:
        made = scratch / to.name
        contents: dict[str, bytes] = {}
        if openvino_ir:
            info, contents = _with_ir(info, own, scratch)
        if with_float and info.method != "float":
            info = info.model_copy(update={"files": [*info.files, *_float_files(found, run_id)]})
        contents |= {file.name: read_file(own / file.name) for file in info.files if file.name not in contents}
        contents |= {
            bundle.DOCUMENT: bundle.document(info),
            "predict.py": (files("quantlib.export") / "predict.py").read_bytes(),
            "README.md": card.write(info, to.name).encode(),
        }
        for name, content in contents.items():
            write_atomically(made / name, content)
        checksums.write(made, {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
        made.rename(to)
    return info


def _with_ir(info: ModelInfo, own: Path, scratch: Path) -> tuple[ModelInfo, dict[str, bytes]]:
    """The document of a bundle with IR in place of the ONNX file for OpenVINO, and the contents of the IR's files."""
    from quantlib.export import openvino_ir  # It imports torch.

    place = next((place for place, file in enumerate(info.files) if file.runtime == "openvino"), None)
    if place is None:
        names = ", ".join(file.name for file in info.files)
        raise ModelError(
            f"The bundle of {info.variant} has no file for OpenVINO to write as IR, only {names}: leave out "
            "--openvino-ir."
        )
    file = info.files[place]
    described = openvino_ir.write(own / file.name, info.model_copy(update={"files": [file]}), scratch)
    exchanged = [*info.files[:place], *described.files, *info.files[place + 1 :]]
    path = scratch / described.files[0].name
    contents = {each.name: each.read_bytes() for each in (path, path.with_suffix(".bin"))}
    return info.model_copy(update={"files": exchanged}), contents


def _float_files(found: Sequence[ModelInfo], run_id: str) -> list[FileInfo]:
    chosen = [file for each in found if each.method == "float" for file in each.files if file.name.endswith(".onnx")]
    if not chosen:
        raise ModelError(f"Run {run_id} has no ONNX file of the float model: leave out --float.")
    return chosen


def _files_of(models: Path, run_id: str) -> list[Path]:
    found = checksums.listed(models / run_id)
    if not found:
        runs = sorted((path.parent.name for path in models.glob("*/SHA256SUMS")), reverse=True)
        known = f"The newest are: {', '.join(runs[:5])}." if runs else "Start one with `quantflow run`."
        raise ModelError(f"No files of a run {run_id!r} in {models}{suggest(run_id, runs)} {known}")
    return found


def _choose(found: Sequence[ModelInfo], run_id: str, variant: str | None) -> ModelInfo:
    """The document of the bundle of a variant, made from those of all files of the run."""
    names = list(dict.fromkeys(each.variant for each in found))
    if variant is None:
        variant = next((each.variant for each in found if each.files[0].verdict == "winner"), None)
        if variant is None:
            raise ModelError(f"Run {run_id} has no winner: choose one of its variants, --variant {' or '.join(names)}.")
    if variant not in names:
        raise ModelError(f"Run {run_id} has no variant {variant!r}{suggest(variant, names)} It has {', '.join(names)}.")
    own = [each for each in found if each.variant == variant]
    chosen = [file for each in own for file in each.files if file.is_accepted] or [each.files[0] for each in own]
    best_first = sorted(
        chosen,
        key=lambda file: (
            file.verdict != "winner",
            file.measured is None,
            file.measured.latency_p50_ms if file.measured else 0,
        ),
    )
    return own[0].model_copy(update={"files": best_first})
