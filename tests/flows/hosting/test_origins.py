"""Whom a server on loopback answers: raw requests, as a browser sends them for another site's page."""

import http.client
import json
import os
from urllib.parse import urlsplit

import pytest

SOCKETS = (
    "/api/events/in",
    "/api/events/out",
    "/api/logs/out",
    "/api/task_runs/subscriptions/scheduled",
    "/api/work_pools/quantflow/workers/connect",
)
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    "Sec-WebSocket-Protocol": "prefect",
}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
FOREIGN_ORIGINS = (
    "http://evil.example",
    "null",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:1",
    "https://127.0.0.1:{port}",
    "http://127.0.0.1:{port}.evil.example",
    "http://evil.example:{port}",
    "http://127.0.0.1:{port}/",
    "",
)
FOREIGN_HOSTS = (
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.0.0.2:{port}",
    "0.0.0.0:{port}",
)


@pytest.fixture(scope="module")
def address(prefect_server):
    """127.0.0.1:PORT of a server as `quantflow run` starts it."""
    return urlsplit(os.environ["PREFECT_API_URL"]).netloc


def ask(address, path, headers=(), method="GET", body=None):
    """(status, headers, body) of the answer to a request with exactly these headers, plus Host if it is missing."""
    connection = http.client.HTTPConnection(address, timeout=30)
    fields = list(headers.items()) if isinstance(headers, dict) else list(headers)
    connection.putrequest(method, path, skip_host=any(name == "Host" for name, _ in fields), skip_accept_encoding=True)
    for name, value in fields:
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    # An upgraded connection has no end.
    found = answer.status, answer.headers, b"" if answer.status == 101 else answer.read()
    connection.close()
    return found


def filled(text, address):
    return text.replace("{port}", address.partition(":")[2])


def num_flows(address):
    status, _, body = ask(address, "/api/flows/count", {"Content-Type": "application/json"}, "POST", b"{}")
    assert status == 200
    return json.loads(body)


def test_clients_without_an_origin_and_its_own_pages_are_answered(address):
    _, port = address.split(":")
    assert ask(address, "/api/health")[0] == 200
    for name in ("127.0.0.1", "localhost", "LOCALHOST"):
        assert ask(address, "/api/health", {"Host": f"{name}:{port}"})[0] == 200
    for name in ("127.0.0.1", "localhost"):
        # The interface calls 127.0.0.1 wherever it was opened.
        own = {"Origin": f"http://{name}:{port}"}
        assert ask(address, "/api/health", own)[0] == 200
        assert ask(address, "/api/flows/", own | PREFLIGHT, "OPTIONS")[0] == 200
    for path in SOCKETS:
        assert ask(address, path, UPGRADE)[0] == 101
        assert ask(address, path, UPGRADE | {"Origin": f"http://127.0.0.1:{port}"})[0] == 101


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_no_other_origin_is_answered(address, origin):
    foreign = {"Origin": filled(origin, address)}
    before = num_flows(address)
    for method, path, body, headers in [
        ("GET", "/api/health", None, {}),
        ("GET", "/", None, {}),
        ("OPTIONS", "/api/flows/", None, PREFLIGHT),
        ("POST", "/api/flows/", b'{"name": "evil"}', {"Content-Type": "application/json"}),
        ("POST", "/api/flows/", b'{"name": "evil"}', {"Content-Type": "text/plain"}),
        ("POST", "/api/flows/", b'{"name": "evil"}', {}),
    ]:
        status, answered, _ = ask(address, path, foreign | headers, method, body)
        assert status == 403, f"{method} {path}"
        assert "access-control-allow-origin" not in answered
    assert num_flows(address) == before
    for path in SOCKETS:
        assert ask(address, path, foreign | UPGRADE)[0] == 403, path


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_no_other_host_is_answered(address, host):
    foreign = {"Host": filled(host, address)}
    # A page whose name was made to resolve here has that name as its origin, and sends no origin with GET.
    for own_origin in ({}, {"Origin": f"http://{foreign['Host']}"}):
        for method, path in (("GET", "/api/health"), ("OPTIONS", "/api/flows/"), ("POST", "/api/flows/")):
            assert ask(address, path, foreign | own_origin, method)[0] == 403, f"{method} {path}"
        for path in SOCKETS:
            assert ask(address, path, foreign | own_origin | UPGRADE)[0] == 403, path


def test_a_second_host_or_origin_hides_nothing(address):
    own, evil = f"http://{address}", "http://evil.example"
    for origins in ((own, evil), (evil, own)):
        assert ask(address, "/api/health", [("Origin", origin) for origin in origins])[0] == 403
    for hosts in ((address, "evil.example"), ("evil.example", address)):
        assert ask(address, "/api/health", [("Host", host) for host in hosts])[0] in {400, 403}


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_page_embeds_is_refused_and_a_link_to_here_is_followed(address, site):
    embedded = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    framed = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert ask(address, "/api/health", embedded)[0] == 403
    assert ask(address, "/api/health", framed)[0] == 403
    assert ask(address, "/api/health", link)[0] == 200
    assert ask(address, "/api/flows/count", link, "POST", b"{}")[0] == 403
    for own in ("same-origin", "none"):
        assert ask(address, "/api/health", embedded | {"Sec-Fetch-Site": own})[0] == 200


def test_a_refusal_says_what_to_open_instead(address):
    _, answered, body = ask(address, "/", {"Host": "evil.example"})
    assert answered["content-type"].startswith("text/plain")
    assert f"Open http://{address} " in body.decode()
