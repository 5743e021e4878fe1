"""`python -m flows.cli`, as `quantflow`."""

from flows.cli.commands import command

command()
