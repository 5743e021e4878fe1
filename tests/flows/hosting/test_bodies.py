"""Prefect's API refuses to store what it could not return again."""

import json
import os
import urllib.error
import urllib.request

import pytest


@pytest.fixture(scope="module")
def create_flow(prefect_server):
    """(status, answer) of a raw request to create a flow."""

    def create(body):
        address = f"{os.environ['PREFECT_API_URL']}/flows/"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return create


def nested(depth):
    return b'{"name": "nested", "labels": ' + b'{"a": ' * depth + b"1" + b"}" * depth + b"}"


def named_flows():
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
        (b'{"name": "large", "labels": {"a": NaN}}', "not a number in JSON"),
        (nested(300), "nested"),
        (nested(100_000), "nested"),
    ],
)
def test_what_cannot_be_returned_again_is_refused_and_not_stored(create_flow, body, fault):
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
