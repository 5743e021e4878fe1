"""Options and arguments that several commands have."""

from pathlib import Path

import click

home_option = click.option(
    "--home",
    envvar="QUANTFLOW_HOME",
    default=".quantflow",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the store, the reports, the models and Prefect's files.",
)


recipe_argument = click.argument("recipe", default="digits")


recipes_argument = click.argument("recipes", metavar="[RECIPE]...", nargs=-1)


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the recipe, such as qat.0.epochs=2.",
)


engine_option = click.option(
    "--engine",
    default="local",
    show_default=True,
    metavar="local|dask|dask://HOST:PORT",
    help="What computes the stages: this process, a cluster on this machine, or that of a Dask scheduler; append "
    "?benchmark=WORKER to name the worker that times files. (The recipe's `engine` is another thing: torch's int8 "
    "kernels.)",
)


verbose_option = click.option("--verbose", is_flag=True, help="Show Prefect's log, and the traceback if it fails.")
