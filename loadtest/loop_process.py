"""A loop that a benchmark sets something beside, in a process of its own, so that nothing else runs in it."""

import asyncio
import os
import sys
from collections.abc import Mapping

from pipeline.errors import FatalError

TIMEOUT_SECONDS = 900.0
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
