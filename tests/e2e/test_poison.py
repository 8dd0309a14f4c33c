"""Records and models that fail: each guilty record ends as one dead letter, and a bad model drains no topic.

All tests share one `store` and one `archive`; each starts the `predict` workers it needs, with models of
`tests.support.models` that misbehave.
"""

import asyncio

import pytest

from pipeline.events import ImageEvent, Outgoing
from tests.support import pictures
from tests.support.eventually import eventually
from tests.support.spine import Spine, picture

STEPS = ("store", "archive")
ENVIRONMENT = {
    "MILLRACE_MAX_BATCH_SIZE": "8",
    "MILLRACE_ALLOW_PYTHON_MODELS": "true",
}
BUILTIN = "builtin:quality,builtin:fingerprint"

pytestmark = pytest.mark.timeout(400)


def python_model(name: str) -> dict[str, str]:
    return {"MILLRACE_MODELS": f"{BUILTIN},python:tests.support.models:{name}"}


def guilty(image_id: str) -> ImageEvent:
    return ImageEvent(id=image_id, data=pictures.guilty())


async def test_poison_in_every_tenth_place(shared_spine: Spine) -> None:
    """Every tenth record poisoned, in many ways: one dead letter each, and every neighbour predicted."""
    poisons = {
        "text": Outgoing(b"k", pictures.TEXT, ()),
        "truncated": Outgoing(b"k", pictures.truncated_jpeg(), ()),
        "bomb": Outgoing(b"k", pictures.bomb_header_png(), ()),
        "model": Outgoing(b"k", pictures.guilty(), ()),
        "version": Outgoing(b"k", pictures.jpeg(), (("ce_type", b"millrace.image.v9"),)),
        "empty": Outgoing(b"k", b"", ()),
    }
    codes = ("undecodable_image", "undecodable_image", "image_too_large", "model", "contract", "contract")
    await shared_spine.start("predict", **python_model("failing_on_guilty"))
    expected = {}
    sending = []
    for number in range(300):
        if number % 10 == 5:
            kind = (number // 10) % len(poisons)
            image_id = f"poison-{number}"
            expected[image_id] = codes[kind]
            poison = list(poisons.values())[kind]
            headers = (*poison.headers, ("ce_id", image_id.encode()))
            outgoing = Outgoing(image_id.encode(), poison.value, headers)
            sending.append(shared_spine.send_raw(outgoing, image_id))
        else:
            sending.append(shared_spine.send(picture(f"poison-{number}", number)))
    await asyncio.gather(*sending)
    accounting = await shared_spine.settled(dead_letters=expected)
    assert accounting.dead_letters == 30
    assert await shared_spine.codes() == expected


async def test_a_picture_that_kills_the_process(shared_spine: Spine) -> None:
    """A picture that aborts the process ends as a dead letter; all others, on its partition too, are predicted.

    Of two on one partition the tests of delivery speak, with processes that start sooner.
    """
    environment = {"MILLRACE_MODELS": "python:tests.support.models:aborting_on_guilty"}
    for number in range(60):
        key = b"one partition" if number % 3 == 0 else None
        await shared_spine.send(picture(f"abort-{number}", number), key=key)
        if number == 30:
            await shared_spine.send(guilty("abort-guilty"), key=b"one partition")
    workers = [shared_spine.crew.start("-m", "agents", "predict", **environment) for _ in range(2)]
    deaths = 0

    async def dead_lettered() -> bool:
        nonlocal deaths
        for index, worker in enumerate(workers):
            if worker.exit_code is not None:
                deaths += 1
                workers[index] = shared_spine.crew.start("-m", "agents", "predict", **environment)
        return "abort-guilty" in await shared_spine.codes()

    await eventually(dead_lettered, 300)
    print("deaths", deaths)
    # A death beside which good records are read repeats what was not committed; one alone repeats nothing.
    await shared_spine.settled(dead_letters=["abort-guilty"], max_repeated=60)
    assert await shared_spine.codes() == {"abort-guilty": "process_killed"}


async def test_a_model_that_fails_on_everything(shared_spine: Spine) -> None:
    """A bad model stops the step, visibly, with the rest of the topic unread; a good one goes on from there."""
    bad = {"MILLRACE_MAX_MODEL_FAULTS": "5"} | python_model("failing")
    (worker,) = await shared_spine.start("predict", **bad)
    await shared_spine.send_many("limited", 100)

    def open_limiter() -> bool:
        return worker.metric("millrace_limiter_open", step="predict") == 1

    await eventually(open_limiter, 60)
    status, answer = worker.get("/readyz")
    assert status == 503
    assert "models fail" in answer
    # Nothing more is lost to it while the operator has a look.
    await asyncio.sleep(1)
    letters = set(await shared_spine.codes())
    print(len(letters), "dead letters")
    assert 5 <= len(letters) <= 5 + 8
    assert await shared_spine.lag("predict") >= 100 - 5 - 8
    assert worker.get("/livez")[0] == 200
    await shared_spine.stop(worker)
    await shared_spine.start("predict")
    await shared_spine.settled(dead_letters=letters)
    assert set((await shared_spine.codes()).values()) == {"model"}


async def test_a_thousand_garbage_records(shared_spine: Spine) -> None:
    """A thousand records in a row that are no pictures are a thousand dead letters and do not stop the step."""
    (worker,) = await shared_spine.start("predict", MILLRACE_MAX_MODEL_FAULTS="5")
    names = [f"garbage-{number}" for number in range(1_000)]
    await asyncio.gather(*(shared_spine.send(ImageEvent(id=name, data=b"garbage")) for name in names))
    await shared_spine.send(picture("garbage-last"))
    await shared_spine.settled(dead_letters=names)
    assert worker.get("/readyz")[0] == 200
    assert worker.metric("millrace_limiter_open", step="predict") == 0


async def test_a_forward_pass_that_hangs(shared_spine: Spine) -> None:
    """A pass longer than its limit ends the process with exit code 70, and nothing is lost or repeated."""
    hanging = {"MILLRACE_BATCH_HANG_SECONDS": "1"} | python_model("sleeping?seconds=3600")
    (worker,) = await shared_spine.start("predict", **hanging)
    await shared_spine.send_many("hang", 40)

    def ended() -> bool:
        return worker.exit_code is not None

    await eventually(ended, 60)
    assert worker.exit_code == 70
    assert "has run for" in worker.log()
    await shared_spine.start("predict")
    await shared_spine.settled()
