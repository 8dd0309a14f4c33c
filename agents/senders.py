"""Sending to one receiver: what is due, attempt by attempt, until it was taken or is given up.

A receiver that fails is asked by one message at a time, ever more seldom, and never holds up another receiver.
Redirects are not followed: a message goes where the operator said. Logs and reasons never have the URL, which may
be a secret.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from agents import messages
from agents.durable import forever
from pipeline import logs, metrics, notifications
from pipeline.errors import ConfigurationError
from pipeline.notifications import Claimed, Message
from pipeline.postgres import Pool
from pipeline.receivers import Receiver

log = logs.get(__name__)

STEP = "notify"
# Messages that one process sends to one receiver at once; more would only wait at the other end.
MOST_AT_ONCE = 4
# Other processes make work too, and none of them says so.
LONGEST_PAUSE_SECONDS = 5.0
FIRST_RETRY_SECONDS = 1.0
MOST_RETRY_SECONDS = 300.0
MOST_RETRY_AFTER_SECONDS = 3600.0
# After so many failures in a row it is the receiver and not a message, and it is asked by one message now and then.
FAILURES_IN_A_ROW = 3
MOST_HOLD_SECONDS = 60.0
# What blames the message itself: the same bytes are not better the next time, but a receiver may be mended.
_REFUSALS = frozenset({400, 405, 406, 411, 413, 414, 415, 422, 431})
MOST_REFUSALS = 3
_REASON_BYTES = 300


@dataclass(frozen=True)
class Answer:
    """What came of one attempt; status 0: there was no answer."""

    status: int
    reason: str
    retry_after_seconds: float | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the receiver has the message."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES


class Sender:
    """Sends what one receiver is due."""

    def __init__(
        self, receiver: Receiver, pool: Pool, http: aiohttp.ClientSession, drain_seconds: float
    ) -> None:
        self._receiver = receiver
        self._pool = pool
        self._http = http
        self._drain_seconds = drain_seconds
        self._woken = asyncio.Event()
        self._attempts: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._is_disabled = False
        self._held_until = 0.0

    def wake(self) -> None:
        """Look for work now."""
        self._woken.set()

    async def run(self) -> None:
        """Send until the receiver says that it is gone, or until cancelled; begun attempts get a moment to end."""
        try:
            while not self._is_disabled:
                self._woken.clear()
                await self._pause(await self._begin())
        finally:
            if self._attempts:
                await asyncio.wait(self._attempts, timeout=self._drain_seconds)
            for attempt in self._attempts:
                attempt.cancel()

    async def _begin(self) -> float:
        """Begin an attempt if there is room and something is due; return how long to wait before the next."""
        if (held := self._held_until - time.monotonic()) > 0:
            return held
        if len(self._attempts) >= (1 if self._failures else MOST_AT_ONCE):
            return LONGEST_PAUSE_SECONDS
        claimed = await forever(self._claim, step=STEP, dependency="database")
        for status, count in claimed.unsent.items():
            metrics.NOTIFICATIONS.labels(self._receiver.name, status).inc(count)
            log.warning("not telling a receiver", receiver=self._receiver.name, why=status, alerts=count)
        if claimed.message is None:
            return LONGEST_PAUSE_SECONDS if claimed.wait_seconds is None else claimed.wait_seconds
        attempt = asyncio.create_task(self._deliver(claimed.message))
        self._attempts.add(attempt)
        attempt.add_done_callback(self._ended)
        return 0.0

    async def _claim(self) -> Claimed:
        return await notifications.claim(self._pool, self._receiver, messages.most_alerts(self._receiver))

    async def _pause(self, seconds: float) -> None:
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(min(seconds, LONGEST_PAUSE_SECONDS)):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _ended(self, attempt: "asyncio.Task[None]") -> None:
        self._attempts.discard(attempt)
        self.wake()
        if not attempt.cancelled() and (error := attempt.exception()) is not None:
            # The message is tried again when its time is over.
            log.error("an attempt failed in our own code", receiver=self._receiver.name, exc_info=error)

    async def _deliver(self, message: Message) -> None:
        """Make one attempt, and note what came of it."""
        receiver = self._receiver
        with metrics.NOTIFICATION_SECONDS.labels(receiver.name).time():
            answer = await self._post(message)
        self._failures = 0 if answer.is_taken else self._failures + 1
        metrics.RECEIVER_FAILING.labels(receiver.name).set(self._failures > 0)
        if answer.is_taken:
            await self._settle(message, "delivered", None)
            return
        said = {"receiver": receiver.name, "message": message.id, "attempts": message.attempts}
        if answer.status == HTTPStatus.GONE:
            self._is_disabled = True
            log.error(
                "the receiver says that it is gone: not asking it again until its entry is changed", **said
            )
        is_refused = answer.status in _REFUSALS and message.attempts >= MOST_REFUSALS
        if self._is_disabled or is_refused or message.age_seconds > receiver.give_up_seconds:
            log.error("giving a message up", reason=answer.reason, alerts=len(message.alerts), **said)
            await self._settle(message, "failed", answer.reason)
            return
        seconds = max(_backoff_seconds(message.attempts), answer.retry_after_seconds or 0.0)
        self._hold(answer)
        metrics.NOTIFICATIONS.labels(receiver.name, "retried").inc()
        log.warning("a receiver did not take a message", reason=answer.reason, again_in=seconds, **said)
        await forever(
            lambda: notifications.retry(self._pool, receiver, message, seconds, answer.reason),
            step=STEP,
            dependency="database",
        )

    def _hold(self, answer: Answer) -> None:
        """Leave a receiver alone that asks for it, or that fails whatever it is sent."""
        seconds = answer.retry_after_seconds or 0.0
        if self._failures >= FAILURES_IN_A_ROW:
            seconds = max(
                seconds, min(MOST_HOLD_SECONDS, _backoff_seconds(self._failures - FAILURES_IN_A_ROW + 1))
            )
        self._held_until = time.monotonic() + seconds

    async def _settle(self, message: Message, status: notifications.Settled, reason: str | None) -> None:
        await forever(
            lambda: notifications.settle(self._pool, self._receiver, message, status, reason),
            step=STEP,
            dependency="database",
        )
        metrics.NOTIFICATIONS.labels(self._receiver.name, status).inc(len(message.alerts))

    async def _post(self, message: Message) -> Answer:
        receiver, now = self._receiver, datetime.now(UTC)
        try:
            # Read for every attempt: the files may be rotated.
            address, keys = await asyncio.to_thread(lambda: (receiver.address(), receiver.secrets()))
        except ConfigurationError as error:
            return Answer(0, error.message)
        try:
            payload = messages.body(receiver, message, now)
        except Exception as error:
            # It is the message, and the next time it is no better; others wait behind it.
            log.exception("a message cannot be written", receiver=receiver.name, message=message.id)
            return Answer(HTTPStatus.UNPROCESSABLE_ENTITY, f"cannot be written ({type(error).__name__})")
        try:
            async with (
                asyncio.timeout(receiver.timeout_seconds),
                self._http.post(
                    address,
                    data=payload,
                    headers=messages.headers(message, payload, keys, now),
                    allow_redirects=False,
                ) as response,
            ):
                text = (await response.content.read(_REASON_BYTES)).decode("utf-8", "replace")
                reason = f"HTTP {response.status} {' '.join(text.split())}".strip().replace("\x00", "")
                return Answer(response.status, reason, retry_after_seconds(response.headers, now))
        except TimeoutError:
            return Answer(0, f"no answer within {receiver.timeout_seconds:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Its text may quote the URL.
            return Answer(0, f"cannot be reached ({type(error).__name__})")


def retry_after_seconds(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return how long a receiver asks to be left alone, at most an hour; None if it does not say."""
    given = headers.get("Retry-After", "").strip()
    if given.isascii() and given.isdigit():
        return min(float(given), MOST_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(given)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - now).total_seconds()), MOST_RETRY_AFTER_SECONDS)


def _backoff_seconds(attempts: int) -> float:
    seconds = min(MOST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(attempts - 1, 20))
    # What failed together is not tried again together.
    return seconds * random.uniform(0.75, 1.25)
