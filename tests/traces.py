"""Network calls and writes of a command and all its child processes, as the kernel sees them."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRACE = shutil.which("strace")
# A container may forbid tracing.
WORKS = STRACE is not None and subprocess.run([STRACE, "true"], check=False, capture_output=True).returncode == 0
MISSING = None if WORKS else "needs strace, and permission to trace processes (Debian: strace)"


@dataclass(frozen=True)
class Trace:
    """What strace recorded of a command."""

    returncode: int
    said: str
    calls: list[str]
    """Every call of `connect`, `sendto`, `sendmsg` and `openat`."""

    def foreign(self) -> list[str]:
        """The calls with an address other than loopback."""
        addresses = (line for line in self.calls if re.search(r"sa_family=AF_INET6?\b", line))
        return [line for line in addresses if not re.search(r'inet_addr\("127\.|"::1"|"::ffff:127\.', line)]

    def written(self) -> set[Path]:
        """The files that were opened for writing or created."""
        opened = (re.search(r'openat\(AT_FDCWD, "([^"]*)", \S*(O_WRONLY|O_RDWR|O_CREAT)', line) for line in self.calls)
        return {Path(found[1]) for found in opened if found}


def trace(command: Sequence[str], file: Path, **options: Any) -> Trace:
    """Run a command under strace.

    Args:
        command: What to run.
        file: Where the trace is written.
        options: Passed to `subprocess.run`.
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
