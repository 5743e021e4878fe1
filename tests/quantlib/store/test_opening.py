import sys

import pytest

from quantlib.errors import MachineError
from quantlib.store.local import Store
from quantlib.store.opening import open_store


def test_a_home_has_its_own_store_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTFLOW_STORE", raising=False)
    assert type(open_store(tmp_path)) is Store
    monkeypatch.setenv("QUANTFLOW_STORE", "")
    assert type(open_store(tmp_path)) is Store
    assert open_store(tmp_path).folder == tmp_path / "store"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_shared_folder_is_named_by_its_path(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFLOW_STORE", f"{scheme}{tmp_path}")
    store = open_store(tmp_path / "home")
    assert store.place == str(tmp_path)
    assert store.folder == tmp_path / "home" / "store"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is 'nonsense': give s3://BUCKET/PREFIX"),
        ("a/relative/folder", "the full path of a folder on a shared file system"),
        ("ftp://server/folder", "is 'ftp://server/folder': give s3://"),
        ("s3://", "is 's3://': give s3://"),
        ("s3:///prefix", r"which cannot be opened \(.*\): give s3://"),
        (
            "az://container/prefix",
            r"which cannot be opened \(.*Account must be specified.*and the environment variables",
        ),
        ("/no/such/folder", "and there is no such folder: mount or create it"),
    ],
)
def test_a_wrong_name_is_an_error_in_one_line(url, message, tmp_path, monkeypatch):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    if url.startswith(("s3:///", "az:")):
        pytest.importorskip("obstore", reason="needs obstore")
    monkeypatch.setenv("QUANTFLOW_STORE", url)
    with pytest.raises(MachineError, match=message) as found:
        open_store(tmp_path)
    assert "\n" not in str(found.value)
    assert "QUANTFLOW_STORE" in str(found.value)


def test_an_object_store_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setenv("QUANTFLOW_STORE", "s3://bucket/prefix")
    with pytest.raises(MachineError, match=r"obstore is not installed: pip install 'quantflow\[shared\]'"):
        open_store(tmp_path)
