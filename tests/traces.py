"""What a command and everything that it starts ask of the network and write, as the kernel sees it."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRACE = shutil.which("strace")
# A container may forbid to trace.
WORKS = STRACE is not None and subprocess.run([STRACE, "true"], check=False, capture_output=True).returncode == 0
MISSING = None if WORKS else "needs strace, and leave to trace processes (Debian: strace)"


@dataclass(frozen=True)
class Trace:
    """What was seen of a command."""

    returncode: int
    said: str
    calls: list[str]
    """Every call of `connect`, `sendto`, `sendmsg` and `openat`."""

    def foreign(self) -> list[str]:
        """The calls that name an address which is not loopback's."""
        addresses = (line for line in self.calls if re.search(r"sa_family=AF_INET6?\b", line))
        return [line for line in addresses if not re.search(r'inet_addr\("127\.|"::1"|"::ffff:127\.', line)]

    def written(self) -> set[Path]:
        """The files that were opened to be written, or made."""
        opened = (re.search(r'openat\(AT_FDCWD, "([^"]*)", \S*(O_WRONLY|O_RDWR|O_CREAT)', line) for line in self.calls)
        return {Path(found[1]) for found in opened if found}


def trace(command: Sequence[str], file: Path, **options: Any) -> Trace:
    """Run a command under strace.

    Args:
        command: What to run.
        file: Takes the trace.
        options: Of `subprocess.run`.
    """
    calls = ["-f", "-qq", "-s", "4096", "-e", "trace=connect,sendto,sendmsg,openat"]
    done = subprocess.run(
        [str(STRACE), *calls, "-o", str(file), *command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    return Trace(done.returncode, done.stdout, file.read_text(errors="replace").splitlines())
