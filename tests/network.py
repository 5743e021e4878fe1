"""Network namespaces that stand for machines: each has a link of its own to a switch, and a link can be taken down."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_numbers = itertools.count()


class Network:
    """A switch in the namespace of the tests, and machines behind it; close it after use."""

    def __init__(self) -> None:
        number = next(_numbers)
        self._name = f"qf{os.getpid() % 100_000}{number}"
        self._subnet = f"10.213.{(os.getpid() + number) % 250}"
        self._machines: list[str] = []
        self.address = f"{self._subnet}.1"
        """That of the tests' own namespace."""
        _ip("link", "add", self._name, "type", "bridge")
        _ip("address", "add", f"{self.address}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")

    def add(self, machine: str) -> None:
        """Add a machine."""
        self._machines.append(machine)
        space, link = self._space(machine), self._link(machine)
        _ip("netns", "add", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", self._name, "up")
        _ip("-n", space, "address", "add", f"{self._subnet}.{10 + len(self._machines)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")

    def on(self, machine: str) -> list[str]:
        """What to put before a command that is to run on a machine."""
        return ["ip", "netns", "exec", self._space(machine)]

    def cut(self, machine: str) -> None:
        """Take a machine's link down."""
        _ip("link", "set", self._link(machine), "down")

    def restore(self, machine: str) -> None:
        """Let a machine be reached again."""
        _ip("link", "set", self._link(machine), "up")

    def close(self) -> None:
        """Remove everything."""
        for machine in self._machines:
            _ip("netns", "delete", self._space(machine))
        _ip("link", "delete", self._name)

    def _space(self, machine: str) -> str:
        return f"{self._name}-{machine}"

    def _link(self, machine: str) -> str:
        return f"{self._name}{machine}"


@contextmanager
def open_network() -> Iterator[Network]:
    """A network; the test is skipped where it may not be made."""
    try:
        network = Network()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"needs the right to make network namespaces: {reason}")
    yield network
    network.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
