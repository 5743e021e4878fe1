"""What Prefect's API refuses to store: what it could not tell again."""

import json
import os
import urllib.error
import urllib.request

import pytest

from flows.processes import RepeatedErrors


@pytest.fixture(scope="module")
def create_flow(prefect_server):
    """(status, answer) of a raw request to keep a flow."""

    def create(body: bytes):
        address = f"{os.environ['PREFECT_API_URL']}/flows/"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return create


def nested(depth: int) -> bytes:
    return b'{"name": "nested", "labels": ' + b'{"a": ' * depth + b"1" + b"}" * depth + b"}"


def named_flows() -> list[str]:
    request = urllib.request.Request(
        f"{os.environ['PREFECT_API_URL']}/flows/filter", b"{}", {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [flow["name"] for flow in json.load(answer)]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"name": "half \\ud800"}', "half a character"),
        (b'{"name": "half", "tags": ["\\udfff"]}', "half a character"),
        (b'{"name": "half", "labels": {"\\udc00": 1}}', "half a character"),
        ('{"name": "half \\ud800"}'.encode("utf-16"), "half a character"),
        (b'{"name": "large", "labels": {"a": 1' + b"0" * 30 + b"}}", "64 bits"),
        (b'{"name": "large", "labels": {"a": 1e999}}', "finite"),
        (b'{"name": "large", "labels": {"a": NaN}}', "no number of JSON"),
        (nested(300), "nested"),
        (nested(100_000), "nested"),
    ],
)
def test_what_cannot_be_told_again_is_refused_and_not_stored(create_flow, body, fault):
    status, answer = create_flow(body)
    assert status == 422, answer
    assert fault in json.loads(answer)["detail"]
    assert not {"half", "large", "nested", "half \ud800"} & set(named_flows())


def test_a_request_that_is_too_long_is_refused(create_flow):
    status, answer = create_flow(b'{"name": "' + b"a" * (64 * 1024 * 1024) + b'"}')
    assert status == 422, answer
    assert "bytes" in answer


def test_everything_else_is_answered_by_prefect(create_flow):
    for name in ("plain", "Grüße 🐜", "pair \U0001f41c"):
        status, answer = create_flow(json.dumps({"name": name}).encode())
        assert status in {200, 201}, answer
        assert name in named_flows()
    status, _ = create_flow(b"no JSON")
    assert status == 422


def test_an_error_that_a_log_repeats_is_found_once(tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("pkg.HTTPError: of yesterday\n" * 5)
    errors = RepeatedErrors(log)
    assert errors.news() == []
    with log.open("a") as file:
        file.write("pkg.HTTPError: 500 for http://127.0.0.1:4200/api\nWorker started\nWorker started\n")
        file.flush()
        assert errors.news() == []
        file.write("  File x, line 3\npkg.HTTPError: 500 for http://127.0.0.1:4201/a")
        file.flush()
        assert errors.news() == []  # The line is not whole yet.
        file.write("pi\n")
        file.flush()
        assert errors.news() == ["pkg.HTTPError: 500 for http://127.0.0.1:4201/api"]
        file.write("pkg.HTTPError: 500 for http://127.0.0.1:4202/api\n")
        file.flush()
        assert errors.news() == []


def test_a_log_that_is_not_there_yet_repeats_nothing(tmp_path):
    assert RepeatedErrors(tmp_path / "worker.log").news() == []
