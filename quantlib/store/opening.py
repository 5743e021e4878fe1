"""Which store a home has: its own, or one that it shares with other machines."""

import os
from pathlib import Path

from quantlib.errors import MachineError
from quantlib.store.local import Store
from quantlib.store.objects import Objects

_VARIABLE = "QUANTFLOW_STORE"
_SCHEMES = ("s3", "gs", "az")


def open_store(home: Path) -> Store:
    """The store of a home: the one that `$QUANTFLOW_STORE` names, with a cache in this home, or else its own.

    Raises:
        MachineError: If the variable names no place, or one that this installation cannot use.
    """
    url = os.environ.get(_VARIABLE, "")
    if not url:
        return Store(home / "store")
    from quantlib.store.shared import SharedStore

    return SharedStore(home / "store", _open_objects(url))


def _open_objects(url: str) -> Objects:
    scheme, separator, rest = url.partition("://")
    if separator and scheme in _SCHEMES and rest.strip("/"):
        from quantlib.store.bucket import BucketObjects

        return BucketObjects(url)
    folder = Path(rest if scheme == "file" else url).expanduser()
    if (separator and scheme != "file") or not folder.is_absolute():
        raise MachineError(
            f"{_VARIABLE} is {url!r}: give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or the full "
            "path of a folder on a shared file system; or unset it to use this home alone."
        )
    if not folder.is_dir():
        raise MachineError(f"{_VARIABLE} is {url!r}, and there is no such folder: mount or create it, then run again.")
    from quantlib.store.folder import FolderObjects

    return FolderObjects(folder)
