"""Real worker processes for tests: start, wait until ready, kill, terminate, read the log."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from millrace import ports, processes
from tests.support.eventually import eventually_sync

READY_SECONDS = 60.0


class WorkerProcess:
    """One step as a process of its own, with its log in a file."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log_path: Path) -> None:
        self.port = int(environment.get("MILLRACE_WORKER_PORT", 0)) or ports.find_free()
        self.log_path = log_path
        self._arguments = [sys.executable, *arguments]
        self._environment = {**os.environ, **environment, "MILLRACE_WORKER_PORT": str(self.port)}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def step(self) -> str:
        """The last argument: a step's name, for those started by `-m agents STEP`."""
        return self._arguments[-1]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def start(self) -> "WorkerProcess":
        # Not by hand: what is left of a test run that was killed would go on, and take its share of the machine.
        self._process = processes.spawn(self._arguments, log_path=self.log_path, env=self._environment)
        return self

    def get(self, path: str) -> tuple[int, str]:
        """Ask the worker's own HTTP site; status 0 when it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_ready(self, timeout_seconds: float = READY_SECONDS) -> "WorkerProcess":
        def ready() -> bool:
            assert self.exit_code is None, f"worker ended with {self.exit_code}:\n{self.log()[-3000:]}"
            return self.get("/readyz")[0] == 200

        eventually_sync(ready, timeout_seconds)
        return self

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wait(self, timeout_seconds: float) -> None:
        """Return when it has ended by itself."""
        assert self._process is not None
        self._process.wait(timeout_seconds)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def terminate(self, timeout_seconds: float = 60.0) -> tuple[int, float]:
        """SIGTERM; return the exit code and the seconds it took."""
        assert self._process is not None
        started = time.monotonic()
        self._process.terminate()
        return self._process.wait(timeout_seconds), time.monotonic() - started

    def metric(self, name: str, **labels: str) -> float:
        """Sum a metric's values over all label sets that contain these; 0 when there are none."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(label in series for label in wanted):
                total += float(value)
        return total

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class Workers:
    """The workers of one test, all with the same settings; none outlives it."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.environment = dict(environment)
        self._folder = folder
        self._workers: list[WorkerProcess] = []

    def start(self, *arguments: str, **environment: str) -> WorkerProcess:
        """Start `python ARGUMENTS`; extra environment for this one only."""
        log_path = self._folder / f"worker-{len(self._workers)}.log"
        worker = WorkerProcess(list(arguments), {**self.environment, **environment}, log_path)
        self._workers.append(worker)
        return worker.start()

    @property
    def running(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers if worker.exit_code is None]

    def close(self) -> None:
        for worker in self.running:
            worker.kill()

    def logs(self) -> str:
        return "\n".join(f"== {worker.log_path.name}\n{worker.log()[-4000:]}" for worker in self._workers)


@contextmanager
def workers(environment: Mapping[str, str], folder: Path) -> Iterator[Workers]:
    """Give a test its workers; on failure their logs are printed."""
    started = Workers(environment, folder)
    try:
        yield started
    except BaseException:
        print(started.logs())
        raise
    finally:
        started.close()
