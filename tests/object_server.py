"""An object store for tests: moto's server in its own process, and a proxy in front of it that makes requests fail."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# One request at a time: with threads, moto looks for an object and then writes it, and two may find none.
_SERVE = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple(sys.argv[1], int(sys.argv[2]), DomainDispatcherApplication(create_backend_app))
"""
BUCKET = "bucket"


class ObjectServer:
    """moto's S3 in memory: what it holds is lost when it is killed.

    Args:
        host: The address that it listens on.
    """

    def __init__(self, host="127.0.0.1"):
        self.host = host
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        self.process = None

    def start(self):
        """Start it, with an empty bucket."""
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVE, self.host, str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=5).close()
            except OSError:
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.05)
            else:
                return

    def kill(self):
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def pause(self):
        """Let it hold its connections, and answer nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        """Let it answer again."""
        os.kill(self.process.pid, signal.SIGCONT)


def environment(server, prefix):
    """What a process needs to share a store.

    Args:
        server: An ObjectServer or a Proxy.
        prefix: Of the names of all objects.
    """
    return {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "QUANTFLOW_STORE": f"s3://{BUCKET}/{prefix}",
    }


@contextmanager
def serving(host="127.0.0.1"):
    """A running server, killed at the end; the test is skipped where it, or its client, is not installed."""
    pytest.importorskip("moto", reason="needs moto[server]")
    pytest.importorskip("obstore", reason="needs obstore")
    server = ObjectServer(host)
    server.start()
    yield server
    server.kill()


class Proxy:
    """Passes requests on, or does what `decide` says.

    decide(method, path, number) returns None to pass the request on, or
        "lose"    pass it on, and close the connection in place of the answer
        "drop"    close the connection at once
        "ignore"  pass it on without its conditions
        a number  answer with this status, and do not pass it on
    """

    def __init__(self, target_port):
        self.decide = lambda method, path, number: None
        self.num_requests = 0
        self.requests = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with proxy._lock:
                    number = proxy.num_requests
                    proxy.num_requests += 1
                    proxy.requests.append((self.command, self.path, len(body)))
                decision = proxy.decide(self.command, self.path, number)
                if decision == "drop":
                    self.close_connection = True
                    return
                if isinstance(decision, int):
                    self.send_response(decision)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                headers = dict(self.headers)
                if decision == "ignore":
                    headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
                try:
                    status, answered, content = self.ask(body, headers)
                except (OSError, http.client.HTTPException):
                    self.close_connection = True  # The server is gone.
                    return
                if decision == "lose":
                    self.close_connection = True
                    return
                self.send_response_only(status)
                for name, value in answered:
                    if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                        self.send_header(name, value)
                length = dict(answered).get("Content-Length", len(content)) if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def ask(self, body, headers):
                connection = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
                try:
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
                finally:
                    connection.close()

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_request  # noqa: N815 (http.server's names)

            def handle(self):
                with suppress(ConnectionError):  # A client that was killed.
                    super().handle()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
