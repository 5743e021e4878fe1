"""Python imports this at each start where its folder is in PYTHONPATH: notes every address that a process tries."""

import os
import sys

_EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}
_FILE = os.environ["CONNECTIONS_FILE"]


def _note(event: str, arguments: tuple) -> None:
    if event not in _EVENTS:
        return
    # (socket, address) for what sends; (host, port, …) for what looks a name up.
    address = arguments[1] if event.startswith(("socket.connect", "socket.send")) else arguments[:2]
    if isinstance(address, tuple) and address:
        line = f"{address[0]}\t{event}\t{' '.join(sys.orig_argv)[:200]}\n".replace("\r", " ")
        descriptor = os.open(_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)


sys.addaudithook(_note)
