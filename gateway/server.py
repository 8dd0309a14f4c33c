"""The gateway's server: uvicorn on the address of the settings, from the first signal handler to the last request.

A signal lets requests under way finish, at most `MILLRACE_SHUTDOWN_GRACE_SECONDS`; those that wait for a result are
answered at once with what there is.
"""

import errno
import gc
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gateway.app import create_app
from pipeline import garbage, logs
from pipeline.errors import ConfigurationError
from pipeline.settings import PREFIX, Settings

# Left for closing the clients after the last request.
CLOSE_SECONDS = 5.0
# Bounds what clients that open connections and send nothing can hold.
MAX_CONNECTIONS = 5_000
KEEP_ALIVE_SECONDS = 75  # longer than the idle timeouts of common load balancers, so that they close first
BACKLOG = 1024
# Objects made before young ones are looked at for cycles: a day of a GPU's samples is 8,640 rows, and at Python's
# 700 looking at them again and again took a sixth of the time. So many take some megabytes.
GARBAGE_THRESHOLD = 20_000

log = logs.get("gateway")


class Server(uvicorn.Server):
    """uvicorn that tells the application at the signal, not when the last request has ended."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down; a second SIGINT gives up waiting."""
        app = self.config.app
        assert isinstance(app, FastAPI)
        if (live := getattr(app.state, "live", None)) is not None:
            live.stopping.set()
        super().handle_exit(sig, frame)


def listen(options: Settings) -> list[socket.socket]:
    """Bind the gateway's address, every one its name stands for.

    Raises:
        ConfigurationError: the port is taken or the address is not this machine's.
    """
    host, port = options.gateway_host, options.gateway_port
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit it. Without it headers go, and a small body waits 40 ms for the client to
            # acknowledge them; asyncio sets it only where it makes the socket itself.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError as error:
        for listener in sockets:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"{PREFIX}GATEWAY_PORT: port {port} on {host} is used by another process; "
                "stop that or set another port"
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigurationError(f"{PREFIX}GATEWAY_PORT: this user may not bind port {port}") from None
        raise ConfigurationError(f"{PREFIX}GATEWAY_HOST: cannot bind {host} ({error.strerror})") from None
    return sockets


async def serve(options: Settings) -> None:
    """Serve until a signal.

    Raises:
        ConfigurationError: a setting is wrong; nothing was served.
    """
    app = create_app(options)
    sockets = listen(options)
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,  # the request metric counts; a line per request would cost more than it tells
            server_header=False,
            # Ours, below: uvicorn would log a wrong setting as a crash.
            lifespan="off",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, int(options.shutdown_grace_seconds - CLOSE_SECONDS)),
        )
    )
    # uvicorn listens to signals only while it serves, and raises them again when it has shut down: with the
    # default handlers a clean stop would end with 143.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    async with app.router.lifespan_context(app):
        garbage.set_apart()
        gc.set_threshold(GARBAGE_THRESHOLD, *gc.get_threshold()[1:])
        log.info("gateway listens", host=options.gateway_host, port=options.gateway_port)
        await server.serve(sockets)
    log.info("gateway stopped")
