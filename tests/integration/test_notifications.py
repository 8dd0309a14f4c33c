"""Who is told of alerts, against a real PostgreSQL and a real HTTP receiver, without Kafka."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import aiohttp
import msgspec
import pytest

from agents.senders import Sender
from pipeline import notifications
from pipeline.notifications import Transition
from pipeline.postgres import Pool
from pipeline.receivers import Receiver
from pipeline.settings import load
from pipeline.telemetry import Alert
from tests.support.eventually import eventually
from tests.support.receivers import ReceiverServer, alert, receiving

FIRING, RESOLVED = alert(1), alert(1, "resolved")
_senders: list[Sender] = []


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    opened = await Pool.open(load(database_url=database))
    yield opened
    await opened.close()


def receiver(url: str = "http://127.0.0.1:9", **values: Any) -> Receiver:
    return msgspec.convert({"name": "on-call", "kind": "webhook", "url": url} | values, Receiver)


async def save(pool: Pool, to: Receiver, *alerts: Alert, published_at: datetime | None = None) -> int:
    moment = published_at or datetime.now(UTC)
    saved = await notifications.save(pool, [Transition(to, one, moment) for one in alerts])
    for sender in _senders:
        sender.wake()
    return saved


async def statuses(pool: Pool, *alerts: Alert) -> dict[str, str]:
    found = await notifications.notifications(pool, [one.id for one in alerts or (FIRING,)])
    return {each.state: each.status for each in found}


async def drained(pool: Pool, to: Receiver, status: notifications.Settled = "delivered") -> list[list[str]]:
    """Settle everything that is due, and return the states of each message."""
    sent: list[list[str]] = []
    while (claimed := await notifications.claim(pool, to, 20)).message is not None or claimed.unsent:
        if claimed.message is not None:
            sent.append([each.state for each in claimed.message.alerts])
            await notifications.settle(pool, to, claimed.message, status)
    return sent


@asynccontextmanager
async def sending(pool: Pool, server: ReceiverServer, **values: Any) -> AsyncIterator[Receiver]:
    """Run a sender for this receiver until the block ends."""
    to = receiver(server.url, **values)
    async with aiohttp.ClientSession() as http:
        sender = Sender(to, pool, http, 1.0)
        _senders.append(sender)
        task = asyncio.create_task(sender.run())
        yield to
        _senders.remove(sender)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_order_of_arrival_makes_no_difference(pool: Pool) -> None:
    """However often and in whatever order transitions come: first that it fires, then that it is over, once."""
    to = receiver()
    for number, order in enumerate(("fr", "rf", "ffr", "frf", "rff", "rrf", "frr")):
        steps = {"f": alert(number), "r": alert(number, "resolved")}
        sent: list[list[str]] = []
        for step in order:
            await save(pool, to, steps[step])
            sent += await drained(pool, to)
        assert sent == [["firing"], ["resolved"]]
        assert await statuses(pool, alert(number)) == {"firing": "delivered", "resolved": "delivered"}


async def test_the_end_of_what_nobody_was_told(pool: Pool) -> None:
    """It is skipped if the alert never fired, or if nobody took the message that it does."""
    to = receiver()
    await save(pool, to, RESOLVED)
    assert await drained(pool, to) == []
    assert await statuses(pool) == {"resolved": "skipped"}
    failing, over = alert(2), alert(2, "resolved")
    await save(pool, to, failing, over)
    assert await drained(pool, to, "failed") == [["firing"]]
    assert await statuses(pool, failing) == {"firing": "failed", "resolved": "skipped"}


async def test_a_message_that_was_begun_is_sent_again_as_it_was(pool: Pool) -> None:
    """What a killed process began is found by another one when its time is over: same id, same members."""
    to = receiver(timeout_seconds=0.05, group_by=["host"])
    await save(pool, to, FIRING, alert(2))
    first = (await notifications.claim(pool, to, 20)).message
    assert first is not None
    await save(pool, to, alert(3))

    async def again() -> bool:
        claimed = await notifications.claim(pool, to, 20)
        found = claimed.message
        if found is None or found.id != first.id:
            return False
        assert (found.alerts, found.attempts) == (first.alerts, 2)
        return True

    await eventually(again, 10.0)


async def test_what_comes_together_is_one_message(pool: Pool) -> None:
    """Transitions of a group that arrive while one of them waits share its message; others have their own."""
    async with receiving() as server, sending(pool, server, group_by=["host"], group_wait_seconds=0.5) as to:
        elsewhere = alert(4, host="node-8")
        await save(pool, to, *(alert(number) for number in range(3)), elsewhere)
        await eventually(lambda: len(server.taken) == 2, 10.0)
        assert sorted(len(request.alerts) for request in server.taken) == [1, 3]


async def test_one_bad_receiver_harms_no_other(pool: Pool) -> None:
    """While one answers nothing, the other is told; 400 is given up after three tries, 410 at once and for good."""
    async with (
        receiving() as good,
        receiving(lambda _: 400) as refusing,
        receiving(lambda _: 410) as gone,
        sending(pool, good, name="good") as to_good,
        sending(pool, refusing, name="refusing") as to_refusing,
        sending(pool, gone, name="gone") as to_gone,
        sending(pool, ReceiverServer(url="http://127.0.0.1:9"), name="down") as to_down,
    ):
        for to in (to_down, to_gone, to_refusing, to_good):
            await save(pool, to, FIRING)

        async def settled() -> bool:
            found = await notifications.notifications(pool, [FIRING.id])
            by_name = {each.receiver: (each.status, each.reason) for each in found}
            assert by_name["good"] == ("delivered", None)
            assert by_name["gone"] == ("failed", "HTTP 410 answered")
            assert by_name["refusing"] == ("failed", "HTTP 400 answered")
            assert by_name["down"] == ("sending", "cannot be reached (ClientConnectorError)")
            return True

        await eventually(settled, 20.0)
        assert (len(refusing.requests), len({request.id for request in refusing.requests})) == (3, 1)
        await save(pool, to_gone, alert(2))
        await save(pool, to_good, alert(2))
        await eventually(lambda: len(good.taken) == 2, 10.0)
        assert len(gone.requests) == 1


async def test_retry_after_is_obeyed(pool: Pool) -> None:
    """A receiver that asks to be left alone is not sent anything, not even another message."""
    async with receiving(lambda number: 429 if number == 0 else 200) as server, sending(pool, server) as to:
        server.headers["Retry-After"] = "1"
        await save(pool, to, FIRING)
        await eventually(lambda: len(server.requests) == 1, 10.0)
        at = asyncio.get_running_loop().time()
        await save(pool, to, alert(2))
        await eventually(lambda: len(server.taken) == 2, 10.0)
        assert asyncio.get_running_loop().time() - at > 0.5


async def test_what_is_too_old_is_given_up(pool: Pool) -> None:
    """What nobody could be told for as long as the receiver says is not told any more, nor is its end."""
    to = receiver(give_up_seconds=60)
    old = datetime.now(UTC) - timedelta(minutes=2)
    await save(pool, to, FIRING, RESOLVED, published_at=old)
    assert await drained(pool, to) == []
    assert await statuses(pool) == {"firing": "failed", "resolved": "skipped"}


async def test_what_cannot_be_written_is_given_up(pool: Pool) -> None:
    """An alert of which no message can be made is tried like one that is refused, and others are told."""
    dawn = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))
    async with receiving() as server, sending(pool, server, kind="slack") as to:
        await save(pool, to, alert(2, since=dawn))
        await eventually(lambda: _is_failed(pool, alert(2)), 20.0)
        await save(pool, to, alert(3))
        await eventually(lambda: len(server.taken) == 1, 10.0)
    assert len(server.requests) == 1


async def _is_failed(pool: Pool, one: Alert) -> bool:
    return await statuses(pool, one) == {"firing": "failed"}


async def test_silences(pool: Pool) -> None:
    """What fits a silence is not told; when it ends, what still fires is; the end of what was told always is."""
    to, now = receiver(), datetime.now(UTC)
    told, over = alert(2, host="node-9"), alert(2, "resolved", host="node-9")
    await save(pool, to, told)
    assert await drained(pool, to) == [["firing"]]
    silence = await notifications.silence(
        pool,
        {"host": "node-*", "rule": ("a", "thermal_margin")},
        now,
        now + timedelta(hours=1),
        "works",
        "me",
    )
    await notifications.silence(pool, {"host": "other"}, now, now + timedelta(hours=9), "", "me")
    shorter, shorter_over = alert(3), alert(3, "resolved")
    await save(pool, to, FIRING, shorter, shorter_over, over)
    assert await drained(pool, to) == [["resolved"]]
    found = await notifications.notifications(pool, [FIRING.id])
    assert [(each.status, each.silence_id, each.reason) for each in found] == [
        ("silenced", silence.id, "works")
    ]
    assert await statuses(pool, shorter) == {"firing": "silenced", "resolved": "skipped"}
    assert await statuses(pool, told) == {"firing": "delivered", "resolved": "delivered"}
    ended = await notifications.end_silence(pool, silence.id)
    assert ended is not None
    assert ended.match == {"host": "node-*", "rule": ("a", "thermal_margin")}
    assert await notifications.end_silence(pool, silence.id) is None
    assert await drained(pool, to) == [["firing"]]
    assert await statuses(pool) == {"firing": "delivered"}
    listed = [await notifications.silences(pool, every=every, limit=10) for every in (False, True)]
    assert [len(each) for each in listed] == [1, 2]


async def test_what_is_settled_and_old_goes(pool: Pool) -> None:
    """Retention deletes who was told of what, and silences, once they are over; what waits stays."""
    to, now = receiver(), datetime.now(UTC)
    await save(pool, to, FIRING)
    await drained(pool, to)
    await save(pool, to, alert(2))
    made = await notifications.silence(pool, {"host": "a"}, now, now + timedelta(hours=1), "", "")
    later = now + timedelta(minutes=5)
    assert [await notifications.expire(pool, moment, 10) for moment in (now, later, later)] == [0, 1, 0]
    assert await statuses(pool, FIRING, alert(2)) == {"firing": "waiting"}
    await notifications.end_silence(pool, made.id)
    assert await notifications.expire(pool, later, 10) == 1


async def test_an_alertmanager_is_told_again_until_it_is_over(pool: Pool) -> None:
    """What fires is said again before it expires there, all in one request, and never after its end."""
    async with (
        receiving() as server,
        sending(pool, server, kind="alertmanager", resend_seconds=0.3) as to,
    ):
        await save(pool, to, FIRING, alert(2))

        def posted() -> list[list[dict[str, Any]]]:
            return [msgspec.json.decode(request.body) for request in server.taken]

        await eventually(lambda: sum(len(body) == 2 for body in posted()) >= 2, 10.0)
        await save(pool, to, RESOLVED)

        def ends() -> list[tuple[str, str]]:
            return [(each["labels"]["gpu_uuid"], each["endsAt"]) for body in posted() for each in body]

        over = ("GPU-1", "2026-11-21T12:09:01Z")
        await eventually(lambda: over in ends(), 10.0)
        # The other one goes on to be repeated.
        at = len(ends())
        await eventually(lambda: len(ends()) >= at + 2, 10.0)
        assert {uuid for uuid, _ in ends()[ends().index(over) + 1 :]} == {"GPU-2"}
        assert server.requests[0].path == "/api/v2/alerts"


async def test_two_processes_send_a_message_once(pool: Pool) -> None:
    """Several senders for one receiver share its messages and double none."""
    async with (
        receiving() as server,
        sending(pool, server) as to,
        sending(pool, server),
        sending(pool, server),
    ):
        alerts = [alert(number, state) for number in range(30) for state in ("firing", "resolved")]
        await save(pool, to, *alerts)
        await eventually(lambda: len(server.taken) >= len(alerts), 20.0)
        assert sorted(server.told()) == sorted((each.id, each.state) for each in alerts)
        assert server.repeats() == 0
