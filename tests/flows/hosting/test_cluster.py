"""What `--engine` stands for."""

import re

import pytest

from flows.hosting import cluster
from flows.hosting.cluster import ENGINE, Address, open_executor, parse_engine
from flows.hosting.server import free_port
from quantlib.errors import MachineError, RecipeError
from tasks.execution import LocalExecutor


@pytest.mark.parametrize(
    ("engine", "address"),
    [
        ("local", None),
        ("dask", Address(None, None)),
        ("dask://scheduler:8786", Address("tcp://scheduler:8786", None)),
        ("dask+tls://10.0.0.1:8786?benchmark=bench-1", Address("tls://10.0.0.1:8786", "bench-1")),
    ],
)
def test_an_engine_is_this_process_or_a_cluster(engine, address):
    assert parse_engine(engine) == address
    assert re.fullmatch(ENGINE, engine)


WRONG = ("", "fbgemm", "ray", "dask://", "dask:8786", "tcp://x:1", "dask://x?timed=a", "dask\n")


@pytest.mark.parametrize("engine", WRONG)
def test_another_engine_is_an_error_that_says_what_is_allowed(engine):
    with pytest.raises(RecipeError, match=r"Allowed: local \(this process\), dask \(a cluster on this machine\)"):
        parse_engine(engine)


def test_the_local_engine_is_this_process(tmp_path):
    with open_executor("local", tmp_path, print) as executor:
        assert isinstance(executor, LocalExecutor)


def test_without_dask_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with (
        pytest.raises(MachineError, match=re.escape("pip install 'quantflow[dask]'")),
        open_executor("dask", tmp_path, print),
    ):
        pass


def test_a_scheduler_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="it looks for a scheduler")
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(MachineError, match=f"No Dask scheduler answers at tcp://{address}: .*Start one with `dask "),
        open_executor(f"dask://{address}", tmp_path, print),
    ):
        pass
