"""A team's server, set up with the commands of docs/operations.md: the password, TLS, PostgreSQL, a worker, a run."""

import base64
import json
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from dashboard_driver import PROJECT, Dashboard
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

INITDB = shutil.which("initdb") or next(iter(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
POSTGRES = INITDB and str(Path(INITDB).resolve().with_name("postgres"))
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="needs openssl, for passwords and certificates")


def documented(section):
    """The commands of a section of docs/operations.md, in order."""
    text = (PROJECT / "docs" / "operations.md").read_text()
    (content,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```\w*\n(.*?)^```$", content, re.DOTALL | re.MULTILINE)


PASSWORD, SERVER, PROXY, CLIENT, DEPLOY, WORKER = documented("A server for a team")


class Team(Dashboard):
    """A server that was set up by hand: only a dashboard's recipe and calls are used.

    Args:
        folder: Where the commands run.
        api: The address given to clients, such as https://localhost:443/api.
    """

    def __init__(self, folder, port, api):
        super().__init__(folder)
        self.port, self.api = port, api
        self.url = f"http://127.0.0.1:{port}"
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment["PREFECT_HOME"] = str(folder / "prefect")
        self.bash(PASSWORD)
        self.password = (folder / "auth-string").read_text().strip()
        self.headers |= authorization(self.password)

    def fill(self, text):
        """The documentation's text, adapted to this machine."""
        text = text.replace("https://SERVER/api", self.api).replace("4200", str(self.port))
        text = text.replace("/data/quantflow", str(self.home))
        return re.sub(r"^(prefect (server|worker) start)", r"exec \1", text, flags=re.MULTILINE)

    def bash(self, *commands):
        """Run commands, one after the other, in one shell."""
        done = subprocess.run(self.shell(*commands), check=False, **self.place(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def shell(self, *commands):
        return ["bash", "-e", "-c", "\n".join(map(self.fill, commands))]

    def place(self):
        return {"cwd": self.folder, "env": self.environment}


def authorization(password):
    return {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(command, log, **options):
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(30)


@contextmanager
def postgresql(log):
    """A database server; its address for Prefect."""
    # PostgreSQL refuses to run as root.
    user = None if os.geteuid() else "nobody"
    with tempfile.TemporaryDirectory(prefix="quantflow-") as place:
        if user is not None:
            os.chown(place, pwd.getpwnam(user).pw_uid, -1)
        data, port = f"{place}/data", free_port()
        quiet = {"user": user, "cwd": place}
        subprocess.run(
            [INITDB, "-D", data, "-U", "prefect", "-A", "trust"], check=True, stdout=subprocess.DEVNULL, **quiet
        )
        command = [POSTGRES, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", place, "-c", "fsync=off"]
        with process(command, log, **quiet):
            _wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close())
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"


@contextmanager
def nginx(team, port):
    """The documented proxy for localhost, with its own certificate."""
    folder = team.folder / "nginx"
    folder.mkdir()
    key = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-keyout", f"{folder}/SERVER.key", "-out", f"{folder}/SERVER.pem"]
    subprocess.run([*key, "-addext", "subjectAltName=DNS:localhost", *files], check=True, capture_output=True)
    site = team.fill(PROXY).replace("/etc/ssl", str(folder)).replace("server_name SERVER", "server_name localhost")
    (folder / "site.conf").write_text(site.replace("listen 443", f"listen 127.0.0.1:{port}"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"{'' if os.geteuid() else 'user root;'} daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {places} include {folder}/site.conf; }}\n"
    )
    with process([NGINX, "-c", str(folder / "nginx.conf"), "-e", "stderr"], team.folder / "nginx.log"):
        yield folder / "SERVER.pem"


@contextmanager
def server(team, database):
    """The documented server."""
    command = SERVER.replace("postgresql+asyncpg://USER:PASSWORD@HOST:5432/DATABASE", database)
    with process(team.shell(command), team.folder / "server.log", **team.place()):
        _wait(lambda: urllib.request.urlopen(f"{team.url}/api/health", timeout=5).close())
        yield


def status(url, headers, context=None):
    """Status of the answer to a request that lists flows."""
    request = urllib.request.Request(f"{url}/flows/filter", b"{}", {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def is_let_in(url, token, context=None):
    """Whether the events socket accepts a password."""
    address = url.replace("http", "ws", 1) + "/events/in"
    with connect(address, subprotocols=["prefect"], ssl=context, proxy=None) as found:
        found.send(json.dumps({"type": "auth", "token": token}))
        try:
            return json.loads(found.recv(30))["type"] == "auth_success"
        except ConnectionClosed:
            return False


def check_the_door(url, password, context=None):
    for wrong in ({}, authorization("team:guess"), {"Authorization": f"Bearer {password}"}):
        assert status(url, wrong, context) == 401
    assert status(url, authorization(password), context) == 200
    assert [is_let_in(url, token, context) for token in (None, "team:guess", password)] == [False, False, True]


def quantflow_run(team, *commands):
    """`quantflow run` of the tiny recipe, after the setup in `commands`: (exit status, output)."""
    run = "quantflow run tiny.toml --home home"
    done = subprocess.run(
        team.shell(*commands, run), check=False, **team.place(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout.decode()


def check_the_run(team):
    (run,) = team.runs(name={"any_": ["tiny"]})
    assert run["state"]["name"] == "Completed"
    # The states of tasks are sent through the socket.
    team.wait_for_tasks(run["id"], "Completed", 8)


@pytest.mark.slow
def test_everybody_needs_the_documented_password_and_a_run_that_has_it_reports_to_the_server(tmp_path):
    port = free_port()
    team = Team(tmp_path, port, f"http://127.0.0.1:{port}/api")
    assert (tmp_path / "auth-string").stat().st_mode & 0o077 == 0
    assert len(team.password) > 40
    with server(team, f"sqlite+aiosqlite:///{tmp_path / 'team.db'}"):
        check_the_door(team.api, team.password)
        code, said = quantflow_run(team, CLIENT)
        assert code == 0, said
        check_the_run(team)
        code, said = quantflow_run(team, CLIENT, "unset PREFECT_API_AUTH_STRING")
        assert code != 0
        assert "401" in said


def test_a_server_of_a_run_asks_for_the_documented_password(tmp_path):
    (commands,) = documented("Who can reach it")
    team = Team(tmp_path, 4200, "")
    code, said = quantflow_run(team, commands)
    assert code == 0, said
    code, said = quantflow_run(team, commands, "export PREFECT_API_AUTH_STRING=me:guess")
    assert code != 0
    assert "401" in said


@pytest.mark.slow
def test_a_dashboard_asks_for_the_documented_password_and_runs_what_is_begun_with_it(tmp_path):
    password = "me:secret"
    settings = {"PREFECT_SERVER_API_AUTH_STRING": password, "PREFECT_API_AUTH_STRING": password}
    dashboard = Dashboard(tmp_path, settings)
    dashboard.headers |= authorization(password)
    dashboard.start()
    try:
        check_the_door(f"{dashboard.url}/api", password)
        dashboard.wait(dashboard.begin("ptq"))
    finally:
        assert dashboard.stop() == []


@pytest.mark.slow
@pytest.mark.skipif(INITDB is None, reason="needs PostgreSQL's server (Debian: postgresql)")
@pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: nginx)")
@pytest.mark.usefixtures("ctrl_c_works")  # The worker hands SIGTERM on to itself as SIGINT.
def test_server_proxy_worker_and_flow_run_with_postgresql_and_tls_as_documented(tmp_path):
    port, front = free_port(), free_port()
    team = Team(tmp_path, port, f"https://localhost:{front}/api")
    with ExitStack() as stack:
        stack.enter_context(server(team, stack.enter_context(postgresql(tmp_path / "postgresql.log"))))
        certificate = stack.enter_context(nginx(team, front))
        team.environment["PREFECT_API_SSL_CERT_FILE"] = str(certificate)
        _wait(lambda: socket.create_connection(("127.0.0.1", front), 1).close())
        check_the_door(team.api, team.password, ssl.create_default_context(cafile=certificate))
        team.bash(CLIENT, f"cd {PROJECT}", DEPLOY)
        worker = team.shell(CLIENT, f"cd {PROJECT}", WORKER)
        stack.enter_context(process(worker, tmp_path / "worker.log", **team.place()))
        for state in ("Completed", "Cached"):
            run = team.begin("ptq")
            team.wait(run)
            team.wait_for_tasks(run, state, 8)
        code, said = quantflow_run(team, CLIENT)
        assert code == 0, said
    assert not (tmp_path / "prefect" / "prefect.db").exists()


def _wait(check, seconds=120):
    """Wait until `check` gets an answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            return check()
        time.sleep(0.3)
    raise AssertionError(f"no answer in {seconds} s")
