"""`record` as a real process: all that a fleet sends is kept once, whatever is killed; bad records stop nothing."""

import asyncio
import random

from pipeline.events import Outgoing
from pipeline.topics import GPU_SAMPLES, GPU_WINDOWS
from tests.support.fleet import Fleet
from tests.support.spine import Spine

OLD_WINDOW = (
    b'{"key": "a", "start": "1970-01-01T00:00:00Z", "end": "1970-01-01T00:01:00Z", '
    b'"gpus": [{"gpu_uuid": "GPU-1", "host": "a"}]}'
)


EXPIRED_WINDOW = OLD_WINDOW.replace(b"1970", b"2020")


async def test_record_killed_again_and_again_keeps_everything_once(spine: Spine) -> None:
    """SIGKILL of two workers under load, at any moment: each sample once, each alert's steps once and in order."""
    fleet = Fleet(spine, "kill")
    await spine.start("record", "record")
    stop = asyncio.Event()

    async def send() -> None:
        while not stop.is_set():
            await fleet.tick(5)
            await fleet.close_window()
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(send())
    await fleet.wait_stored(100)
    for _ in range(4):
        victim = random.choice(spine.running("record"))
        victim.kill()
        spine.crew.start("-m", "agents", "record")
        await asyncio.sleep(random.uniform(0.5, 1.5))
    stop.set()
    await sending
    # What a death between publishing steps and noting it repeats.
    await fleet.settled(max_repeated_steps=4 * 100)


async def test_bad_records_stop_nothing(spine: Spine) -> None:
    """Garbage among samples and windows becomes dead letters of `record`, and its neighbours are kept.

    A window of a replay of years ago is no garbage, nor is a key that cannot be shown.
    """
    fleet = Fleet(spine, "bad", hosts=1)
    bad = {
        GPU_SAMPLES.name: [
            b"37.5",
            b"\xff",
            b"",
            b'{"host": "a", "samples": []}',
            b'{"host": "a", "samples": [{}]}',
        ],
        GPU_WINDOWS.name: [
            b"{}",
            OLD_WINDOW,
        ],
    }
    for topic, values in bad.items():
        for value in values:
            await fleet.tick(key="node\r")
            await spine.publisher.publish_forever(
                spine.settings.topic(topic), Outgoing(b"bad-0", value, ()), step="test"
            )
        await fleet.close_window()
    await spine.publisher.publish_forever(
        spine.settings.topic(GPU_WINDOWS.name), Outgoing(b"a", EXPIRED_WINDOW, ()), step="test"
    )
    await spine.start("record", "store")
    await fleet.settled()
    assert await fleet.peer_keys() == {"node\ufffd"}
    await spine.wait_caught_up("store")
    letters = await spine.database.dead_letters(group=spine.settings.group("record"))
    assert sorted(stored.letter.code for stored in letters) == ["contract"] * 7
    assert {stored.letter.record.topic for stored in letters} == {
        spine.settings.topic(topic) for topic in bad
    }
