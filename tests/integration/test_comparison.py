"""Two deployments side by side, on a real database: what is compared, what is counted, when there is nothing."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.agreement import LabelPair
from pipeline.comparison import Outcomes, SideName
from pipeline.database import Database
from pipeline.events import Box, ModelResult, Prediction, Receipt
from pipeline.settings import PREFIX, load
from tests.support import services
from tests.support.samples import dead_letter, embedding, prediction

A, B = SideName("default"), SideName("other")
Replace = msgspec.structs.replace


@pytest.fixture
async def db(database: str) -> AsyncIterator[Database]:
    opened = await Database.open(load(database_url=database))
    yield opened
    await opened.close()


def classified(label: str, score: float = 0.5, model: str = "hf:a") -> ModelResult:
    return ModelResult(model=model, version="1", digest="d", task="classify", label=label, score=score)


def result(image_id: str, deployment: str, *models: ModelResult, **changes: Any) -> Prediction:
    """A result with a receipt: a batch of 4 on the CPU, of which each pass took 0.4 s."""
    receipt = Receipt(
        topic="images.bulk.v1", partition=0, offset=7, input_sha256="a" * 64, batch_size=4, device="cpu",
        queue_seconds=0.1, decode_seconds=0.02, forward_seconds=0.4,
    )  # fmt: skip
    revision = changes.pop("revision", 0)
    return prediction(
        image_id, id=f"{image_id}-{deployment}-{revision}", deployment=deployment, models=models,
        **{"receipt": receipt, "revision": revision} | changes,
    )  # fmt: skip


async def test_agreement_latency_and_cost_of_what_both_have_seen(db: Database) -> None:
    """Models of one task are compared on the images that both predicted; times are of those images."""
    predictions = []
    for number in range(4):
        boxes = (Box("cat", 0.9, 0, 0, 10, 10),) if number else ()
        detected = ModelResult(model="hf:detr", version="1", digest="d", task="detect", boxes=boxes)
        name = f"image-{number}"
        predictions.append(result(name, "default", classified("cat"), detected, embedding(1.0, 0.0)))
        label = "dog" if number == 3 else "cat"
        slow = Replace(predictions[0].receipt, forward_seconds=0.8, device="cuda:0")
        vector = embedding(0.0, 0.0) if number == 3 else embedding(3.0, 4.0)
        predictions.append(
            result(name, "other", classified(label, 0.75, "hf:b"), detected, vector, receipt=slow)
        )
    await db.save(predictions, [])
    found = await db.compare(A, B)
    assert (found.both, found.a.alone, found.b.alone, found.is_cut) == (4, 0, 0, False)
    assert found.outcomes == (Outcomes("predicted", "predicted", 4),)
    by_task = {one.task: one for one in found.models}
    classify, detect, embed = by_task["classify"], by_task["detect"], by_task["embed"]
    assert (classify.a, classify.b, classify.same_label) == ("hf:a 1", "hf:b 1", 0.75)
    assert (classify.score_difference, classify.images) == (0.25, 4)
    assert classify.disagreements == (LabelPair(a="cat", b="dog", images=1, example="image-3"),)
    assert (detect.same_boxes, detect.iou, detect.boxes_a) == (1.0, 1.0, 3)
    assert embed.cosine == pytest.approx(0.6)
    assert embed.incomparable == 1
    assert (found.a.forward_seconds_per_image, found.b.forward_seconds_per_image) == (0.1, 0.2)
    assert (found.a.batch_size, found.b.devices) == (4.0, {"cuda:0": 4})
    assert found.a.queue_seconds is not None
    assert found.a.queue_seconds.p99 == pytest.approx(0.1, rel=0.01)
    assert found.a.joules_per_image is None


async def test_who_lacks_what_and_why(db: Database) -> None:
    """Images that only one side has are counted on that side, with what became of them on the other."""
    save = [
        result(name, "default", classified("cat"))
        for name in ("shared", "given up", "waiting", "late", "redriven")
    ]
    save += [result(name, "other", classified("cat")) for name in ("shared", "new")]
    save += [result("late", "other", outcome="expired"), result("nobody's", "third", classified("cat"))]
    letters = [
        dead_letter("given up", offset=1, group="predict.other"),
        dead_letter("redriven", offset=2, group="predict.other"),
        dead_letter("new", offset=3, group="predict.default"),
        dead_letter("waiting", offset=4, group="predict.third"),
    ]
    await db.save(save, letters)
    (redriven,) = await db.dead_letters(image_id="redriven")
    await db.mark_redriven(redriven.id)
    found = await db.compare(A, B)
    assert (found.both, found.a.images, found.a.alone, found.b.images, found.b.alone) == (1, 5, 3, 3, 1)
    assert set(found.outcomes) == {
        Outcomes("predicted", "predicted", 1),
        Outcomes("predicted", "dead_lettered", 1),
        Outcomes("predicted", "absent", 2),
        Outcomes("predicted", "expired", 1),
        Outcomes("dead_lettered", "predicted", 1),
    }


async def test_the_newest_results_count_or_those_of_a_revision(db: Database) -> None:
    """Of several versions' results the shown one is compared, or that of the revision that is named."""
    await db.save(
        [
            result("a", "default", classified("old"), revision=1),
            result("a", "default", classified("new"), revision=2),
            result("a", "other", classified("new")),
        ],
        [],
    )
    (newest,) = (await db.compare(A, B)).models
    assert (newest.images, newest.same_label) == (1, 1.0)
    (older,) = (await db.compare(SideName("default", 1), B)).models
    assert (older.images, older.same_label) == (1, 0.0)
    (within,) = (await db.compare(SideName("default", 1), SideName("default", 2))).models
    assert [(pair.a, pair.b) for pair in within.disagreements] == [("old", "new")]
    assert (await db.compare(SideName("default", 3), B)).both == 0


async def test_more_than_a_page_of_results(db: Database, database: str) -> None:
    """Thousands of results are walked page by page; a limit takes the latest, a moment those since then."""
    names = [f"image-{number:04}" for number in range(2300)]
    for deployment in ("default", "other"):
        await db.save([result(name, deployment, classified("cat")) for name in names], [])
    await services.execute(
        database,
        "UPDATE predictions SET stored_at = now() - interval '1 day' * (2300 - substr(image_id, 7)::integer)",
    )
    whole = await db.compare(A, B)
    assert (whole.both, whole.a.images, whole.b.images, whole.is_cut) == (2300, 2300, 2300, False)
    cut = await db.compare(A, B, limit=1000)
    assert (cut.both, cut.a.images, cut.b.images, cut.is_cut) == (1000, 1000, 1000, True)
    assert cut.since is not None
    again = await db.compare(A, B, since=cut.since)
    assert (again.both, again.a.images, again.is_cut) == (1000, 1000, False)


async def test_the_command_says_what_is_shared_and_why_nothing_is(
    db: Database, database: str, tmp_path: Path
) -> None:
    """The command shows both sides and ends with 0, or says why there is nothing to compare and ends with 1."""
    await db.save(
        [
            result("a", "default", classified("cat")), result("a", "other", classified("dog")),
            result("b", "third", classified("dog")),
        ],
        [],
    )  # fmt: skip

    async def run(*arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "millrace", "compare", *arguments, cwd=tmp_path,
            env=os.environ | {f"{PREFIX}DATABASE_URL": database, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    shown, as_json, nothing, unknown, same = await asyncio.gather(
        run("default", "other"),
        run("default", "other", "--json", "--since", "1h"),
        run("default", "third"),
        run("default", "fourth@2"),
        run("default", "default"),
    )
    assert (shown[0], shown[2]) == (0, "")
    assert "1 image predicted by both" in shown[1]
    assert "same label 0.0%" in shown[1]
    assert "100.00 ms" in shown[1]
    assert (as_json[0], json.loads(as_json[1])["both"]) == (0, 1)
    assert nothing[:2] == (1, "")
    assert "no image that both have predicted" in nothing[2]
    assert (unknown[0], unknown[2]) == (1, "fourth@2 has no result\n")
    assert same[0] == 2
