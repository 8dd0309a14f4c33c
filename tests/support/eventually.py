"""The one way tests wait: poll a condition until it holds, and say why it did not."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

_POLL_SECONDS = 0.05


@overload
async def eventually(check: Callable[[], Awaitable[T]], timeout_seconds: float) -> T: ...
@overload
async def eventually(check: Callable[[], T], timeout_seconds: float) -> T: ...
async def eventually(check: Callable[[], Awaitable[T] | T], timeout_seconds: float) -> T:
    """Poll until the check returns something true without failing an assertion, and return that.

    The check may be a plain function or a coroutine function; one that only asserts must `return True`.

    Raises:
        AssertionError: It never held; the cause is its last failure.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        failure: AssertionError | None = None
        result: T | None = None
        try:
            answer = check()
            result = await answer if inspect.isawaitable(answer) else answer
            if result:
                return result
        except AssertionError as error:
            failure = error
        if time.monotonic() >= deadline:
            raise _gave_up(result, timeout_seconds) from failure
        await asyncio.sleep(_POLL_SECONDS)


def eventually_sync(check: Callable[[], T], timeout_seconds: float) -> T:
    """Do what `eventually` does, blocking, in a test that has no event loop."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        failure: AssertionError | None = None
        result: T | None = None
        try:
            result = check()
            if result:
                return result
        except AssertionError as error:
            failure = error
        if time.monotonic() >= deadline:
            raise _gave_up(result, timeout_seconds) from failure
        time.sleep(_POLL_SECONDS)


def _gave_up(result: object, timeout_seconds: float) -> AssertionError:
    return AssertionError(f"not within {timeout_seconds:g} s; the check's last result is {result!r}")
