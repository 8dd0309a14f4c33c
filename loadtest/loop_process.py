"""Loops that a benchmark sets something beside, in a process of their own, so that nothing else runs in it."""

import asyncio
import os
import sys
from collections.abc import Mapping

import msgspec

from pipeline.errors import FatalError

TIMEOUT_SECONDS = 900.0
# Of one line: 100,000 latencies are 2 MB.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
#: For the loops as for the worker (`agents/app.py`): OpenMP threads that wait sleep instead of spinning.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


async def output_of(module: str, *arguments: str, environment: Mapping[str, str] = {}) -> bytes:
    """Run a module to its end and return what it prints.

    Raises:
        FatalError: it failed.
        TimeoutError: it took longer than `TIMEOUT_SECONDS`.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments,
        env=ENVIRONMENT | os.environ | dict(environment), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise FatalError(f"the {arguments[0]} loop ended with code {process.returncode}")
    return out


class LoopProcess:
    """A process that runs one loop after another, as it is asked, and waits in between.

    Importing torch takes seconds each time. It reads a JSON array of arguments from each line of its standard input
    and prints one line for it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = (sys.executable, "-m", module, *arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "LoopProcess":
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=ENVIRONMENT | os.environ,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_ANSWER_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def ask(self, *arguments: str) -> bytes:
        """Run a loop and return what it prints.

        Raises:
            FatalError: the process has ended.
            TimeoutError: it took longer than `TIMEOUT_SECONDS`.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(arguments) + b"\n")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            answer = await process.stdout.readline()
        if not answer:
            raise FatalError(f"the {arguments[0]} loop ended with code {await process.wait()}")
        return answer
