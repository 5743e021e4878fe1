"""The command line, `quantflow`: its commands, apart from those that have a module of their own.

Exit status: 0 with a winner inside the gate, 3 without one, 4 if it is worse than the last run's and the recipe forbids
that, 2 for a wrong recipe or missing input, 1 for a failure.
Heavy imports wait until a command needs them.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from flows.cli.cache import cache
from flows.cli.comparing import compare
from flows.cli.init import init
from flows.cli.options import engine_option, home_option, recipe_argument, recipes_argument, set_option, verbose_option
from flows.cli.outcome import reports_errors, status_of, warn
from flows.cli.reporting import report
from flows.cli.shipping import export, predict
from flows.hosting import processes

if TYPE_CHECKING:
    from quantlib.recipe.schema import Recipe


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("quantflow"), prog_name="quantflow")
def main() -> None:
    """Turn a float PyTorch image classifier into the int8 model to ship."""
    # A recipe's "package.module:function" may be in the user's current folder.
    sys.path.append(str(Path.cwd()))


main.add_command(cache)
main.add_command(compare)
main.add_command(export)
main.add_command(init)
main.add_command(predict)
main.add_command(report)


@main.command()
@recipes_argument
@set_option
@engine_option
@home_option
@verbose_option
@reports_errors
def run(recipes: tuple[str, ...], overrides: tuple[str, ...], engine: str, home: Path, verbose: bool) -> int:
    """Quantize the model of RECIPE, or of each of several.

    RECIPE is a TOML file, a folder of them, or a name that `quantflow recipes` lists; the default is the embedded
    digits. Several are one flow run that ends with one table; stages that they share are computed once.
    """
    from flows.parameters import find_recipes

    found = find_recipes(recipes or ("digits",), overrides)
    if len(found) > 1:
        from flows.cli.many import run_many

        return run_many(found, home, engine=engine, verbose=verbose)
    return _run("quantize", found[0], home, run_id=None, engine=engine, verbose=verbose)


@main.command()
@recipe_argument
@set_option
@home_option
@reports_errors
def plan(recipe: str, overrides: tuple[str, ...], home: Path) -> int:
    """Show which stages a run of RECIPE would reuse, which it would run, and why. Runs nothing."""
    from flows.parameters import find_recipe

    loaded = find_recipe(recipe, overrides)
    from flows.hosting.server import set_defaults

    set_defaults(home.resolve() / "prefect", verbose=False)
    from flows.graphs.planning import plan_run

    stages = plan_run(loaded, home.resolve())
    for stage in stages:
        click.echo(f"  {stage.label:<42} {'reuse' if stage.reused else f'run    {stage.reason}'}")
    num_reused = sum(stage.reused for stage in stages)
    click.echo(f"{num_reused} stages would be reused, {len(stages) - num_reused} would run.")
    return 0


@main.command()
@recipe_argument
@set_option
@home_option
@reports_errors
def inspect(recipe: str, overrides: tuple[str, ...], home: Path) -> int:
    """Show which layers of RECIPE's model become int8, and why the others stay float. Runs nothing."""
    from rich.console import Console

    from flows.cli.console import layers_table
    from flows.parameters import find_recipe
    from quantlib.graph.inspection import inspect_model
    from quantlib.graph.plan import share_of_int8
    from quantlib.inputs import find_inputs

    inputs = find_inputs(find_recipe(recipe, overrides), home.resolve() / "splits")
    layers = inspect_model(inputs.model, inputs.val.num_classes, inputs.transform.input_shape)
    Console().print(layers_table(layers))
    click.echo(f"{share_of_int8(layers):.1%} of the multiply-adds are int8.")
    return 0


@main.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@engine_option
@home_option
@verbose_option
@reports_errors
def resume(run_id: str | None, engine: str, home: Path, verbose: bool) -> int:
    """Resume RUN, or the newest unfinished run, with the recipe it was started with."""
    from quantlib.store.journal import find_unfinished

    unfinished = find_unfinished(home / "runs", run_id)
    click.echo(f"Resuming run {unfinished.file.run_id} ({unfinished.state} at {unfinished.stage or 'its start'}).")
    name, found = unfinished.file.run_id, unfinished.recipe
    return _run(unfinished.file.flow, found, home, run_id=name, engine=engine, verbose=verbose)


@main.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@home_option
@reports_errors
def runs(run_id: str | None, home: Path) -> int:
    """List all runs: state, age, stage, and what to do next; or show everything about RUN, such as why it failed."""
    from rich.console import Console

    from flows.cli.console import run_details, runs_table
    from quantlib.store.journal import find_run, read_runs

    if run_id is not None:
        click.echo(run_details(find_run(home / "runs", run_id)))
        return 0
    found = read_runs(home / "runs")
    console = Console()
    if found:
        console.print(runs_table(found, console.width))
    else:
        console.print(f"No run below {home}. Start one with `quantflow run`.", soft_wrap=True)
    return 0


@main.command()
@home_option
@click.option("--port", default=4200, show_default=True, help="Port of the web interface; 0: any free one.")
@click.option(
    "--runs",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Maximum concurrent runs; with more than one, they disturb each other's timings.",
)
@reports_errors
def dashboard(home: Path, port: int, runs: int) -> int:
    """Watch, schedule, start and retry runs in the browser, until Ctrl-C."""
    from flows.hosting.dashboard import serve
    from quantlib.store.opening import open_store

    open_store(home)  # A wrong QUANTFLOW_STORE is an error now, not in the first nightly run.
    serve(home, port, runs, click.echo)
    return 0


@main.command()
@reports_errors
def recipes() -> int:
    """List the recipes that come with quantflow."""
    from flows.parameters import find_recipe, packaged_recipes

    for name, path in packaged_recipes().items():
        click.echo(f"{name:<20} {find_recipe(str(path)).description}")
    return 0


@main.command()
@click.argument("scheduler", metavar="dask://HOST:PORT")
@click.option("--name", help="Its name in messages, and for ?benchmark=NAME; the machine's by default.")
@click.option(
    "--slots",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many stages it computes at once, each on an equal share of the cores.",
)
@click.option("--host", help="The address to listen on; by default that by which it reaches the scheduler.")
@home_option
@reports_errors
def worker(scheduler: str, name: str | None, slots: int, host: str | None, home: Path) -> int:
    """Compute stages for the runs that use a Dask scheduler, until Ctrl-C.

    HOME must be the folder that the machines which start runs use: they exchange artifacts through it.
    """
    from flows.hosting.cluster import parse_engine, serve_worker
    from quantlib.errors import RecipeError

    found = parse_engine(scheduler)
    if found is None or found.scheduler is None:
        raise RecipeError(f"{scheduler!r} names no scheduler: give dask://HOST:PORT.")
    serve_worker(found.scheduler, home, name, slots, host, click.echo)
    return 0


def _run(name: str, recipe: "Recipe", home: Path, *, run_id: str | None, engine: str, verbose: bool) -> int:
    from rich.console import Console

    from flows.cli.console import StageDisplay, conclusion, result_table
    from flows.cli.running import run_here

    console = Console()
    with StageDisplay(console) as display:
        found = run_here(name, recipe, home, display, warn, run_id=run_id, engine=engine, verbose=verbose)
    console.print(result_table(found.variants, console.width))
    console.print(conclusion(found, recipe.gate.max_top1_drop), highlight=False, soft_wrap=True)
    console.print(f"  report  {home.resolve() / 'reports'}  (run {found.run_id})", highlight=False, soft_wrap=True)
    return status_of(found)


def command() -> NoReturn:
    """Run `main` as the whole process."""
    try:
        main()
    except SystemExit as ended:
        processes.end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    processes.end(0)


if __name__ == "__main__":
    command()
