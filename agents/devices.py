"""Several devices in one pod: a process of the step for each, all members of the same consumer group.

The parent starts them, passes signals on and ends with them; it touches no device, no Kafka and no record. It
starts nothing again: a process that ends by itself takes the others with it, in good order, and whoever runs the
parent starts all of them anew. The invariant: none of them outlives it.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from pipeline import logs, signals
from pipeline.deployments import replica_name
from pipeline.errors import EXIT_CONFIGURATION, EXIT_FATAL, ConfigurationError
from pipeline.settings import PREFIX, Settings

log = logs.get(__name__)

#: As a value of MILLRACE_DEVICE: every GPU that torch sees.
ALL_GPUS = "cuda:all"
_LISTED = re.compile(r"cpu|cuda:(0|[1-9][0-9]*)")
# In a process of its own: counting may initialise CUDA, which no child of the process that did can use.
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_WATCHED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM})
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def listed(device: str) -> tuple[str, ...]:
    """Return the devices that a value of `MILLRACE_DEVICE` names; whether they are there is their process's affair.

    Raises:
        ConfigurationError: there is no GPU, or a list is not one of different GPUs (or `cpu`).
    """
    if device.strip() == ALL_GPUS:
        count = _count_gpus()
        if not count:
            raise ConfigurationError(f"{PREFIX}DEVICE: {ALL_GPUS!r}, but torch sees no GPU")
        return tuple(f"cuda:{index}" for index in range(count))
    names = [name.strip() for name in device.split(",")]
    if len(names) == 1:
        return (names[0],)
    for name in names:
        if not name:
            raise ConfigurationError(f"{PREFIX}DEVICE: {device!r} has an empty place")
        if not _LISTED.fullmatch(name):
            raise ConfigurationError(f"{PREFIX}DEVICE: {name!r} cannot be in a list, only cpu and cuda:N can")
        if name != "cpu" and names.count(name) > 1:
            raise ConfigurationError(
                f"{PREFIX}DEVICE: {name!r} is there twice; one process makes use of a whole GPU"
            )
    return tuple(names)


def _count_gpus() -> int:
    done = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    try:
        return int(done.stdout)
    except ValueError:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise ConfigurationError(f"{PREFIX}DEVICE: torch cannot count the GPUs, it says: {said}") from None


def shares(settings: Settings, devices: Sequence[str]) -> list[Settings]:
    """Return the settings of each device's process: its port, its name and its share of the cores.

    Raises:
        ConfigurationError: there are not so many ports.
    """
    port, count = settings.worker_port, len(devices)
    if port + count > 2**16:
        raise ConfigurationError(f"{PREFIX}WORKER_PORT: {count} ports from {port} on are too many")
    # The parent's number: in a pod it outlives a container, and with it what is known of versions that kill.
    name = settings.replica or replica_name(str(os.getpid()))
    common = share_of_cores(settings, count)
    return [
        settings.model_copy(update={
            **common, "device": device, "worker_port": port and port + index, "replica": f"{name}-{index}",
        })
        for index, device in enumerate(devices)
    ]  # fmt: skip


def share_of_cores(settings: Settings, count: int) -> dict[str, int]:
    """Return what of the threads is not set, for one of so many processes: each would else use all cores."""
    share = max(1, len(os.sched_getaffinity(0)) // count)
    wanted = {"torch_threads": settings.torch_threads, "decode_threads": settings.decode_threads}
    return {name: share for name, value in wanted.items() if value == 0}


def run_each(shared: Sequence[Settings], run: Callable[[Settings], int]) -> int:
    """Call `run` in a process for each of the settings; return when all have ended.

    The code is 0 if a signal ended them and all drained; 78 if one said that a setting is wrong; else 70.
    Called before this process has threads, an event loop or a device.
    """
    # From here on signals wait until they are asked for: none comes between a child's start and its being known.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    parent, running = os.getpid(), dict[int, Settings]()
    sys.stdout.flush()
    sys.stderr.flush()
    for settings in shared:
        child = os.fork()
        if child == 0:
            _be_a_child(parent, before, settings, run)
        running[child] = settings
    log.info("one process for each device", devices={str(pid): one.device for pid, one in running.items()})
    try:
        return _wait(running, shared[0].shutdown_grace_seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_a_child(
    parent: int, mask: set[int | signal.Signals], settings: Settings, run: Callable[[Settings], int]
) -> NoReturn:
    code = EXIT_FATAL
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(EXIT_FATAL)  # it died before the line above
        signals.end_at_once()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        logs.name_process(device=settings.device)
        code = run(settings)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(running: dict[int, Settings], grace_seconds: float) -> int:
    code, is_stopping = 0, False

    def send(number: signal.Signals) -> None:
        for child in running:  # each is there, if only to be reaped
            os.kill(child, number)

    while running:
        number = signal.sigwait(_WATCHED)
        is_asked = number in (signal.SIGTERM, signal.SIGINT)  # a terminal asks the children, too
        if number == signal.SIGALRM:
            log.critical(
                "not ended within the grace period", devices=[one.device for one in running.values()]
            )
            send(signal.SIGKILL)
            continue
        for child, ended in _ended(running):
            settings = running.pop(child)
            if ended == 0 and (is_stopping or is_asked):
                continue
            code = code or (EXIT_CONFIGURATION if ended == EXIT_CONFIGURATION else EXIT_FATAL)
            if ended != EXIT_CONFIGURATION:  # it has said in a line what is wrong
                log.error(
                    "the process of a device ended, and with it all", device=settings.device, code=ended
                )
        if not is_stopping and (number != signal.SIGCHLD or code):
            is_stopping = True
            send(signal.SIGTERM)
            # Each ends by itself before that, unless it is stuck in native code.
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return code


def _ended(running: dict[int, Settings]) -> Iterator[tuple[int, int]]:
    """Reap; as the first process of a container it inherits others, which are none of its business."""
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if child == 0:
            return
        if child in running:
            yield child, os.waitstatus_to_exitcode(status)
