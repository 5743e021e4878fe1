"""The command line: `quantflow run`, `report`, `recipes`.

Exit status: 0 with a winner inside the gate, 3 without one, 2 for a wrong recipe or missing input, 1 for a failure.
Nothing heavy is imported before a command needs it.
"""

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantlib.errors import QuantflowError, RecipeError, StoreError

if TYPE_CHECKING:
    from quantlib.recipe import Recipe
    from quantlib.report import Report

NO_WINNER, WRONG_INPUT, FAILURE, INTERRUPTED = 3, 2, 1, 130

home_option = click.option(
    "--home",
    envvar="QUANTFLOW_HOME",
    default=".quantflow",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the store, the reports, the models and Prefect's files.",
)
verbose_option = click.option("--verbose", is_flag=True, help="Show Prefect's log, and the traceback of a failure.")


def reports_errors(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's errors into one message and an exit status."""

    @wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> None:
        try:
            status = command(*args, **kwargs)
        except StoreError as error:
            status = _complain(str(error), FAILURE)
        except QuantflowError as error:
            status = _complain(str(error), WRONG_INPUT)
        except KeyboardInterrupt:
            status = _complain("Interrupted. Run the same command again: finished stages are kept.", INTERRUPTED)
        except Exception as error:
            if kwargs.get("verbose"):
                traceback.print_exc()
            hint = "" if kwargs.get("verbose") else " Run with --verbose for the traceback."
            status = _complain(
                f"{type(error).__name__}: {error}\nThis is a failure of quantflow or of what it uses.{hint}",
                FAILURE,
            )
        sys.exit(status)

    return run_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("quantflow"), prog_name="quantflow")
def main() -> None:
    """Turn a float PyTorch image classifier into the int8 model to ship."""
    # A recipe's "package.module:function" may lie in the folder that the user is in.
    sys.path.append(str(Path.cwd()))


@main.command()
@click.argument("recipe", default="digits")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, as qat.0.epochs=2.",
)
@home_option
@verbose_option
@reports_errors
def run(recipe: str, overrides: tuple[str, ...], home: Path, verbose: bool) -> int:
    """Quantize the model of RECIPE (a file, or a name from `quantflow recipes`; without one, the embedded digits)."""
    loaded = find_recipe(recipe, overrides)

    from rich.console import Console

    from flows.console import StageDisplay, conclusion, result_table

    console = Console()
    with StageDisplay(console) as display:
        report = _run_flow(loaded, home, display, verbose=verbose)
    console.print(result_table(report.variants))
    console.print(conclusion(report, loaded.gate.max_top1_drop), highlight=False, soft_wrap=True)
    console.print(f"  report  {home.resolve() / 'reports'}  (run {report.run_id})", highlight=False, soft_wrap=True)
    return 0 if report.winner else NO_WINNER


@main.command()
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one run's page to this file instead: tables and plots, for any browser, without network.",
)
@click.option("--run", "run_id", help="The run for --html; by default the newest.")
@home_option
@reports_errors
def report(html: Path | None, run_id: str | None, home: Path) -> int:
    """Show the results of all runs, the newest first; or write one run's page with --html."""
    if html is not None:
        from quantlib.html_report import write_html

        write_html(home / "reports", html, run_id)
        click.echo(f"Report written to {html}")
        return 0

    from itertools import groupby

    from rich.console import Console

    from flows.console import result_table
    from quantlib.report import read_variants

    console = Console()
    rows = read_variants(home / "reports")
    if not rows:
        console.print(f"No run has finished below {home}. Start one with `quantflow run`.", soft_wrap=True)
    for name, group in groupby(rows, key=lambda row: row[0]):
        variants = [variant for _, variant in group]
        console.print(
            f"\n[bold]{name}[/]  recipe {variants[0].recipe}, {variants[0].cpu_model}, "
            f"torch {variants[0].torch_version}",
            highlight=False,
        )
        console.print(result_table(variants))
    return 0


@main.command()
@reports_errors
def recipes() -> int:
    """List the recipes that come with quantflow."""
    for name, path in packaged_recipes().items():
        click.echo(f"{name:<20} {find_recipe(str(path), ()).description}")
    return 0


def find_recipe(name: str, overrides: tuple[str, ...]) -> "Recipe":
    """The recipe of a file, or of a name that `quantflow recipes` lists.

    Raises:
        RecipeError: If there is none, or it is wrong.
    """
    from quantlib.recipe import load_recipe, suggest

    packaged = packaged_recipes()
    path = packaged.get(name, Path(name))
    if not path.exists():
        raise RecipeError(
            f"No recipe {name!r}{suggest(name, packaged)} "
            f"Give the path of a TOML file, or one of: {', '.join(packaged)}."
        )
    return load_recipe(path, overrides)


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with quantflow, by name."""
    folder = Path(str(files("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _run_flow(recipe: "Recipe", home: Path, display: Any, *, verbose: bool) -> "Report":
    from flows.prefect_home import prefect_home

    os.environ["QUANTFLOW_HOME"] = str(home.resolve())
    with prefect_home(home.resolve(), verbose=verbose):
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.quantize import quantize
        from tasks.run import LISTENER

        LISTENER.set(display)
        # The thread that sends heartbeats sleeps a second before it notices that the flow has ended.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            return quantize(recipe)


def _complain(message: str, status: int) -> int:
    click.echo(f"quantflow: {message}", err=True)
    return status


if __name__ == "__main__":
    main()
