"""A damaged store: the damage is noticed, the stage it belongs to runs again, and nothing else does."""

import os

import harness
import pytest

from quantlib.store.local import Store

DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "cut to half": lambda path: _overwrite(path, path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: _overwrite(path, b""),
    "replaced by a named pipe": lambda path: _replace(path, os.mkfifo),
    "replaced by a folder": lambda path: _replace(path, os.mkdir),
    "one byte changed": lambda path: _overwrite(path, _with_one_byte_changed(path.read_bytes())),
}
# The others in the slow tests.
SOME = [
    pytest.param(name, marks=() if name in {"deleted", "one byte changed"} else pytest.mark.slow) for name in DAMAGES
]


def _overwrite(path, content):
    path.chmod(0o644)
    path.write_bytes(content)


def _replace(path, make):
    path.unlink()
    make(path)


def _with_one_byte_changed(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def check_repair(home, expected, record, path, damage):
    makers = {maker.key for maker in Store(home / "store").records() if path.name in {r.sha256 for r in maker.outputs}}
    DAMAGES[damage](path)
    repaired = harness.run(home)
    if damage == "replaced by a folder":
        assert "is a folder, where a file belongs. Remove it" in repaired.error
        return
    assert repaired.error == ""
    assert repaired.variants == expected.variants
    ran = {label for label, cached in repaired.stages.items() if not cached}
    # Two stages can make the same artifact; running in parallel, both may find it damaged.
    labels = {label for label, key in harness.keys_done(home).items() if key in makers}
    assert ran <= labels | {"benchmark-variants"}, f"{record.stage}, {damage}"
    assert ran, f"{record.stage}, {damage}: not noticed"
    assert Store(home / "store").holds(next(ref for ref in record.outputs if ref.sha256 == path.name)) or ran == {
        "benchmark-variants"
    }


def artifacts(home):
    """Each artifact once, with the first record in the flow's order that names it."""
    store = Store(home / "store")
    by_key = {record.key: record for record in store.records()}
    seen = {}
    for key in harness.keys_done(home).values():
        for ref in by_key[key].outputs:
            seen.setdefault(ref.sha256, by_key[key])
    return [(record, home / "store" / "blobs" / sha[:2] / sha) for sha, record in seen.items()]


@pytest.mark.parametrize("damage", SOME)
def test_a_damaged_artifact_is_made_again_and_nothing_else_is(damage, home_copy, undisturbed):
    home, (_, expected) = home_copy, undisturbed
    number = list(DAMAGES).index(damage)
    found = artifacts(home)
    record, path = found[number * len(found) // len(DAMAGES)]
    check_repair(home, expected, record, path, damage)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_artifact_is_made_again_and_nothing_else_is(damage, home_copy, undisturbed):
    home, (_, expected) = home_copy, undisturbed
    for record, path in artifacts(home):
        check_repair(home, expected, record, path, damage)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("damage", SOME)
def test_a_damaged_record_makes_its_stage_run_again_and_nothing_else(damage, home_copy, undisturbed):
    home, (_, expected) = home_copy, undisturbed
    keys = harness.keys_done(home)
    key = keys["calibrate-per_channel"]
    DAMAGES[damage](home / "store" / "records" / f"{key}.json")
    repaired = harness.run(home)
    if damage == "replaced by a folder":
        assert f"{key}.json is a folder, where a file belongs. Remove it" in repaired.error
        return
    assert repaired.variants == expected.variants
    # Whichever of the branches that share it came first.
    assert [keys[label] for label, cached in repaired.stages.items() if not cached] == [key]
