"""`quantflow init`: a first recipe for a folder of images."""

from pathlib import Path

import click

from flows.cli.options import verbose_option
from flows.cli.outcome import reports_errors


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of a classifier of torchvision (.pth or .safetensors), or an exported model (.pt2). Without it, a "
    "MobileNetV2 is trained.",
)
@click.option(
    "--to",
    metavar="FILE",
    default="recipe.toml",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The recipe's file: a new one.",
)
@verbose_option
@reports_errors
def init(folder: Path, weights: Path | None, to: Path, verbose: bool) -> int:  # noqa: ARG001 (for `reports_errors`)
    """Look at the images in FOLDER, and write a recipe for them that says why each value is what it is."""
    from quantlib.new_recipe import write_recipe
    from quantlib.process import prepare_process

    prepare_process()
    write_recipe(folder, weights, to)
    click.echo(str(to))
    return 0
