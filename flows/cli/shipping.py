"""`quantflow export` and `quantflow predict`: a run's model as a folder to ship, and using it."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from flows.cli.options import home_option
from flows.cli.outcome import reports_errors


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--variant", help="The variant to export; the winner by default.")
@click.option(
    "--to",
    required=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The bundle's folder: a new one, or an empty one.",
)
@click.option(
    "--openvino-ir", is_flag=True, help="Write the file for OpenVINO as IR, NAME.xml and NAME.bin, instead of ONNX."
)
@click.option("--float", "with_float", is_flag=True, help="Add the float model's ONNX file, to compare with.")
@home_option
@reports_errors
def export(run_id: str, variant: str | None, to: Path, openvino_ir: bool, with_float: bool, home: Path) -> int:
    """Write the winner of RUN as a folder to ship: its files, what they are, a script that runs them, a model card."""
    from quantlib.export import folder

    info = folder.export(home / "models", run_id, variant, to, openvino_ir=openvino_ir, with_float=with_float)
    click.echo(f"{info.variant} of run {info.run_id} was written to {to}: {', '.join(f.name for f in info.files)}.")
    click.echo(f"Try it: python {to / 'predict.py'} IMAGE, or quantflow predict {to} IMAGE")
    return 0


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--to",
    metavar="FILE.parquet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the answers to this file instead: image, class, probability, and the five likeliest.",
)
@reports_errors
def predict(model: Path, images: tuple[Path, ...], as_json: bool, to: Path | None) -> int:
    """Classify IMAGE... (files, and all images in folders) with MODEL: a bundle's folder, or a file of it."""
    from rich.console import Console
    from rich.progress import Progress

    from flows.cli.console import predictions_table
    from quantlib.export import prediction
    from quantlib.process import prepare_process

    prepare_process()
    paths = prediction.find_images(images)
    predictor = prediction.Predictor(model)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=len(paths) == 1 or not errors.is_terminal) as bar:
        task = bar.add_task(f"{len(paths):,} images", total=len(paths))
        found = list(predictor.predict(paths, lambda done, _: bar.update(task, completed=done)))
    if to is not None:
        prediction.write_parquet(found, to)
        click.echo(f"What {model} says about {len(found):,} images was written to {to}.")
    elif as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
    else:
        Console().print(predictions_table(found))
    return 0
