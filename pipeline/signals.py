"""What SIGTERM and SIGINT do before there is anything to stop in good order."""

import os
import signal


def end_at_once() -> None:
    """Let them end this process with 0 until it handles them otherwise; called before anything is begun.

    Importing torch or a server takes seconds, and the first process of a container gets no signal that it does not
    handle: a pod that is stopped while it starts would stay until it is killed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
