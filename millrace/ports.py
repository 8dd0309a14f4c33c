"""TCP ports of this machine: is one free, and if not, who holds it."""

import errno
import os
import random
import socket
from pathlib import Path

from millrace.processes import name_of
from pipeline.errors import ConfigurationError

_LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h, as /proc/net/tcp prints it


def require_free(host: str, port: int, setting: str) -> None:
    """Make sure that a server could listen on a port.

    Raises:
        ConfigurationError: It could not; one line names the port, its holder and the setting that changes it.
    """
    error = _bind_error(host, port)
    if error is None:
        return
    if error == errno.EADDRINUSE:
        raise ConfigurationError(
            f"port {port} is already in use by {_holder(port) or 'another process'}: "
            f"stop that, or choose another port with {setting}"
        )
    raise ConfigurationError(f"cannot listen on {host}:{port} ({os.strerror(error)}): change {setting}")


def find_free(host: str = "127.0.0.1") -> int:
    """Find a port that a server may listen on and that the kernel gives to no client.

    A client that keeps connecting to a dead server whose port lies in the kernel's own range sooner or later
    connects to itself (TCP simultaneous open), and the server cannot take its port back: so never from there.
    """
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    # Not the module's generator: tests seed that one, and two of them would then choose the same ports.
    choose = random.SystemRandom()
    for _ in range(200):
        port = choose.randrange(10_000, max(first_of_kernel, 10_100))
        if _bind_error(host, port) is None:
            return port
    raise ConfigurationError(f"no free port on {host} below {first_of_kernel}")


def _bind_error(host: str, port: int) -> int | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As the servers do, or connections of the last run in TIME_WAIT would look like a holder.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1)
        except OSError as error:
            return error.errno or errno.EADDRINUSE
    return None


def _holder(port: int) -> str | None:
    """Name the process that listens on a port; None if it belongs to another user or cannot be found."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()  # proc(5): sl local_address rem_address st ... inode is the tenth
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(descriptor.readlink()) in inodes for descriptor in (process / "fd").iterdir()):
                return name_of(int(process.name))
        except OSError:
            continue  # ended meanwhile, or not ours to look into
    return None
