"""Objects in a bucket of an object store: Amazon S3 and servers that speak its protocol, Google Cloud, Azure.

A request whose answer was lost is repeated. It may have been carried out, so a condition that then fails says nothing
by itself: what stands there is read, and compared with what was to be written.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from quantlib.errors import MachineError
from quantlib.store.objects import Found, Listed

T = TypeVar("T")

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# A server that restarts is back within this time.
_PATIENCE_S = 120.0
# Until it has answered once, a wrong address is likelier than a restart.
_FIRST_PATIENCE_S = 15.0
# Each piece is a request of its own, so a slow line does not run into the timeout of one.
_CHUNK_BYTES = 16 << 20
_MAX_PAUSE_S = 3.0
# Refusals that repeating does not change; these three say that it may: timeout, conflict, too many requests.
_FINAL = re.compile(r"status code: 4(?!08|09|29)\d\d")


class _BusyError(Exception):
    """The server refused a write because of another one at the same moment, which then did not happen either."""


class BucketObjects:
    """Objects below a URL.

    It does not survive a fork: a child process opens its own.

    Args:
        url: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Credentials and the server's address
            come from the environment variables that other programs use, such as AWS_ENDPOINT_URL.
        is_patient: Repeat a request for minutes before no answer is an error; else ask once.

    Raises:
        MachineError: If obstore is not installed, or the URL cannot be opened.
    """

    def __init__(self, url: str, *, is_patient: bool = True) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise MachineError(
                f"QUANTFLOW_STORE is {url!r}, and obstore is not installed: pip install 'quantflow[shared]'."
            ) from None
        self._url, self._is_patient, self._has_answered = url, is_patient, False
        self._obstore = obstore
        self._impatient: BucketObjects | None = None
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        self.place = f"{url} at {endpoint}" if endpoint and url.startswith("s3:") else url
        options: Any = {
            "timeout": "60s" if is_patient else "10s",
            "connect_timeout": "5s",
            "allow_http": endpoint.startswith("http:"),
        }
        retries: Any = {"max_retries": 2 if is_patient else 0, "retry_timeout": timedelta(seconds=60)}
        try:
            self._store = from_url(url, client_options=options, retry_config=retries)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise MachineError(
                f"QUANTFLOW_STORE is {url!r}, which cannot be opened ({_reason(error)}): give s3://BUCKET/PREFIX, "
                "gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or a folder, and the environment variables of that service."
            ) from None

    def get(self, name: str) -> Found | None:
        """A small object, or None if there is none."""
        return self._ask(lambda: self._get(name))

    def create(self, name: str, content: bytes) -> Any:
        """Write a small object where there is none; its version, or None if another stands there."""
        return self._ask(lambda: self._put(name, content, None))

    def replace(self, name: str, content: bytes, version: Any) -> Any:
        """Write a small object in place of a version; the new version, or None if that is no longer there."""
        return self._ask(lambda: self._put(name, content, version))

    def size(self, name: str) -> int | None:
        """Bytes of an artifact, or None if there is none."""

        def head() -> int | None:
            try:
                return self._obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                return None

        return self._ask(head)

    def upload(self, name: str, path: Path) -> None:
        """Write an artifact from a file; others see all of it or nothing."""
        self._ask(lambda: self._obstore.put(self._store, name, path, max_concurrency=4))

    def download(self, name: str, size: int) -> Iterator[bytes]:
        """Read an artifact in pieces.

        Raises:
            FileNotFoundError: If there is none.
        """
        for start in range(0, size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, size)

            def get_range(start: int = start, end: int = end) -> bytes:
                return bytes(self._obstore.get_range(self._store, name, start=start, end=end))

            yield self._ask(get_range, missing_too=True)

    def list(self, folder: str) -> Iterator[Listed]:
        """All objects below a folder, in no particular order."""
        pages = self._ask(lambda: list(self._obstore.list(self._store, prefix=folder)))
        return (Listed(found["path"], found["size"]) for page in pages for found in page)

    def delete(self, name: str) -> None:
        """Delete an object, if there is one."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._obstore.delete(self._store, name)

        self._ask(delete)

    def impatient(self) -> "BucketObjects":
        """The same place, asked once: no answer is an error after some seconds."""
        if self._impatient is None:
            self._impatient = BucketObjects(self._url, is_patient=False)
        return self._impatient

    def _get(self, name: str) -> Found | None:
        try:
            found = self._obstore.get(self._store, name)
        except FileNotFoundError:
            return None
        return Found(bytes(found.bytes()), _version_of(found.meta))

    def _put(self, name: str, content: bytes, version: Any) -> Any:
        exceptions = self._obstore.exceptions
        try:
            written = self._obstore.put(self._store, name, content, mode=version or "create")
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            standing = self._get(name)
            if (standing.version if standing is not None else None) == version:
                raise _BusyError(_reason(error)) from None
            return standing.version if standing is not None and standing.content == content else None
        return _version_of(written)

    def _ask(self, request: Callable[[], T], *, missing_too: bool = False) -> T:
        """The answer to a request, which is repeated until there is one.

        Args:
            request: What to ask; it can be carried out more than once.
            missing_too: That there is no such object is an answer.

        Raises:
            MachineError: If there is no answer in time, or the server refuses.
        """
        asked, pause = time.monotonic(), 0.1
        while True:
            try:
                answer = request()
            except FileNotFoundError as error:
                if missing_too:
                    raise
                raise self._refused(error) from None  # A write to a bucket that does not exist.
            except (self._obstore.exceptions.BaseError, _BusyError) as error:
                if _is_final(error, self._obstore.exceptions):
                    raise self._refused(error) from None
                waited = time.monotonic() - asked
                if not self._is_patient or waited > (_PATIENCE_S if self._has_answered else _FIRST_PATIENCE_S):
                    raise MachineError(
                        f"The shared store {self.place} has not answered for {waited:.0f} s ({_reason(error)}): see "
                        "that its server runs and can be reached, then run `quantflow resume`: finished stages are "
                        "kept."
                    ) from None
            else:
                self._has_answered = True
                return answer
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_S)

    def _refused(self, error: Exception) -> MachineError:
        return MachineError(
            f"The shared store {self.place} refuses ({_reason(error)}): check the bucket, the credentials and their "
            "rights, then run `quantflow resume`: finished stages are kept."
        )


def _version_of(meta: Any) -> dict[str, str]:
    """What a replacement compares: Google Cloud goes by the version, all others by the ETag."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _is_final(error: Exception, exceptions: Any) -> bool:
    """Whether the same request would be refused again."""
    refusals = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, exceptions.NotSupportedError)
    return isinstance(error, refusals) or _FINAL.search(str(error)) is not None


def _reason(error: Exception) -> str:
    """One line that says what a server or obstore complained about."""
    text = str(error).partition("\n\nDebug source:")[0]
    told = [re.search(rf"<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message")]
    return ": ".join(found[1] for found in told if found) or text.partition("\n")[0]
