"""No command uses the network, or writes anywhere but to its home, to TMPDIR and where it was told to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import traces
from dashboard_driver import PROJECT, TINY, own_environment

COMMANDS = {
    "run": ["run", "tiny.toml"],
    "plan": ["plan", "tiny.toml"],
    "resume": ["resume"],
    "runs": ["runs"],
    "report": ["report"],
    "page": ["report", "--html", "page.html"],
    "list": ["cache", "list"],
    "verify": ["cache", "verify"],
    "free": ["cache", "free", "--keep-runs", "1"],
    "recipes": ["recipes"],
    "export": ["export", "none", "--to", "bundle"],
    "predict": ["predict", "none.onnx", "tiny.toml"],
    "init": ["init", "tmp"],
    "dask": ["run", "tiny.toml", "--engine", "dask", "--set", "name=spread"],
    "worker": ["worker", "dask"],
    "dashboard": ["dashboard", "--port", "0"],
}
# What they are asked for is not there.
FAILING = {"resume", "export", "predict", "init", "worker"}
# They find nothing, or need nothing, in an empty home.
FAST = [name for name in COMMANDS if name not in {"run", "dask", "dashboard"}]


def furnished(folder):
    (folder / "tiny.toml").write_text(TINY)
    (folder / "tmp").mkdir()
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run commands in."""
    return furnished(tmp_path_factory.mktemp("place"))


@pytest.fixture
def users_home(tmp_path):
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


def given(name, place, users_home):
    """A command and how to run it: as a person who has set nothing, and whose home is empty."""
    places = {"HOME": str(users_home), "TMPDIR": str(place / "tmp")}
    own = own_environment(without=("XDG_", "ORT_", "DO_NOT_TRACK"), OMP_NUM_THREADS="1", **places)
    home = [] if name in {"recipes", "predict", "init"} else ["--home", "home"]
    return [sys.executable, "-m", "flows.cli.commands", *COMMANDS[name], *home], {"cwd": place, "env": own}


@pytest.mark.parametrize("name", FAST)
def test_the_users_home_stays_empty(place, users_home, name):
    command, options = given(name, place, users_home)
    subprocess.run(command, check=False, capture_output=True, timeout=120, **options)
    assert list(users_home.rglob("*")) == []


def test_what_a_run_writes_is_private_if_the_umask_says_so(tmp_path, users_home):
    command, options = given("run", furnished(tmp_path), users_home)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, umask=0o077, **options)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / "home", *(tmp_path / "home").rglob("*"), *(tmp_path / "tmp").rglob("*")]
    assert any(path.suffix == ".pt" for path in written)
    assert [path for path in written if path.lstat().st_mode & 0o077] == []


@pytest.mark.slow
@pytest.mark.skipif(traces.MISSING is not None, reason=str(traces.MISSING))
@pytest.mark.parametrize("name", COMMANDS)
def test_the_network_is_not_used_and_nothing_is_written_elsewhere(place, users_home, tmp_path, name):
    command, options = given(name, place, users_home)
    if name == "dashboard":
        command = ["timeout", "--preserve-status", "--signal", "INT", "60", *command]
    seen = traces.trace(command, tmp_path / "trace", **options)
    assert seen.returncode in ({2} if name in FAILING else {0}), seen.said
    assert seen.foreign() == []
    assert list(users_home.rglob("*")) == []
    # Compiled modules, and the initial database of a new home, are kept where quantflow is installed.
    allowed = (place, PROJECT, Path(sys.prefix), Path("/dev"), Path("/proc"))
    written = {(place / path).resolve() for path in seen.written()}
    assert [path for path in written if not any(path.is_relative_to(folder) for folder in allowed)] == []


def test_the_trace_notices_network_calls_and_writes(tmp_path):
    if traces.MISSING is not None:
        pytest.skip(traces.MISSING)
    program = (
        "import contextlib, socket\n"
        "open('made', 'w').close()\n"
        "for address in ('192.0.2.1', '127.0.0.1'):\n"
        "    for attempt in ('connect', 'sendto'):\n"
        "        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as one:\n"
        "            one.connect((address, 9)) if attempt == 'connect' else one.sendto(b'', (address, 9))\n"
    )
    seen = traces.trace([sys.executable, "-c", program], tmp_path / "trace", cwd=tmp_path)
    assert [re.search(r"(connect|sendto)\(", line)[1] for line in seen.foreign()] == ["connect", "sendto"]
    assert Path("made") in seen.written()
