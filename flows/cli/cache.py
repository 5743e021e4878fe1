"""`quantflow cache`: what is stored, and deleting it."""

from pathlib import Path

import click

from flows.cli.options import home_option
from flows.cli.outcome import FAILURE, reports_errors


@click.group()
def cache() -> None:
    """Inspect the store, check it, and free space: of QUANTFLOW_STORE if that is set, else of this home."""


@cache.command("list")
@home_option
@reports_errors
def cache_list(home: Path) -> int:
    """List every stored stage: age, size, and the runs that used it."""
    from rich.console import Console

    from flows.cli.console import cache_table
    from quantlib.store.journal import read_runs
    from quantlib.store.opening import open_store
    from quantlib.store.retention import list_entries

    Console().print(cache_table(list_entries(open_store(home), read_runs(home / "runs"))))
    return 0


@cache.command("verify")
@home_option
@reports_errors
def cache_verify(home: Path) -> int:
    """Read every artifact and list the missing or damaged ones (exit status 1 if there are any)."""
    from quantlib.store.opening import open_store
    from quantlib.store.retention import find_damage

    store = open_store(home)
    num_read, damage = find_damage(store)
    for record, ref in damage:
        click.echo(f"{record.stage}: {ref.kind} {ref.sha256} is missing or damaged; the next run computes it again.")
    click.echo(f"{store.place}: {num_read} artifacts were read, and {len(damage)} are damaged.")
    return FAILURE if damage else 0


@cache.command("free")
@click.option(
    "--unused-for", metavar="DAYS", type=click.FloatRange(min=0), help="Delete what no run has used for this many days."
)
@click.option(
    "--max-size",
    metavar="GB",
    type=click.FloatRange(min=0),
    help="Delete the least recently used stages above this total size.",
)
@click.option(
    "--keep-runs",
    metavar="N",
    type=click.IntRange(min=0),
    help="Delete what neither the newest N runs nor any unfinished run uses.",
)
@home_option
@reports_errors
def cache_free(unused_for: float | None, max_size: float | None, keep_runs: int | None, home: Path) -> int:
    """Delete stored stages; the reports and the files in models/ stay."""
    from datetime import timedelta

    from quantlib.store.journal import read_runs
    from quantlib.store.opening import open_store
    from quantlib.store.retention import free

    if unused_for is None and max_size is None and keep_runs is None:
        raise click.UsageError("Say what to delete: --unused-for DAYS, --max-size GB or --keep-runs N.")
    store = open_store(home)
    freed = free(
        store,
        read_runs(home / "runs"),
        unused_for=None if unused_for is None else timedelta(days=unused_for),
        max_size=None if max_size is None else int(max_size * 1e9),
        keep_runs=keep_runs,
    )
    what = f"{freed.num_records} stages, {freed.num_blobs} artifacts"
    click.echo(f"Freed {freed.size / 1e6:.1f} MB in {store.place}: {what}.")
    return 0
