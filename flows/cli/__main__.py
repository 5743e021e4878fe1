"""Makes `python -m flows.cli` the same as `quantflow`."""

from flows.cli.commands import command

command()
