"""`quantflow export` and `quantflow predict`: a run's model as a folder to ship, and using it."""

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
@home_option
@reports_errors
def export(run_id: str, variant: str | None, to: Path, home: Path) -> int:
    """Write the winner of RUN as a folder to ship: its files, what they are, a script that runs them, a model card."""
    from quantlib.export import folder

    info = folder.export(home / "models", run_id, variant, to)
    click.echo(f"{info.variant} of run {info.run_id} was written to {to}: {', '.join(f.name for f in info.files)}.")
    click.echo(f"Try it: python {to / 'predict.py'} IMAGE, or quantflow predict {to} IMAGE")
    return 0
