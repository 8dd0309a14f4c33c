"""Search by image with real workers: what is found, that a query leaves nothing, and what the command prints."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadtest.images import SamplePicture, draw
from pipeline import vector_indexes
from pipeline.events import ImageEvent
from pipeline.objects import ObjectStore
from tests.support.eventually import eventually
from tests.support.gateway import JPEG, Gateway, serving
from tests.support.spine import STEPS, Installation, Spine
from tests.support.vectors import clustered, fill, space

pytestmark = pytest.mark.timeout(300)


def form(data: bytes) -> dict[str, tuple[str, bytes]]:
    return {"file": ("picture", data)}


def hits(answer: Any) -> dict[str, float]:
    """Return the images of a page, nearest first, with their scores."""
    assert answer.status_code == 200, answer.text
    return {image["id"]: image["score"] for image in answer.json()["images"]}


async def filled(spine: Spine, count: int) -> list[SamplePicture]:
    """Publish sample pictures, one in six nearly the same as another, and wait until they are stored."""
    await spine.start(*STEPS)
    pictures = list(draw(11, count))
    await asyncio.gather(*(spine.send(ImageEvent(id=one.id, data=one.data)) for one in pictures))
    await spine.settled()
    return pictures


async def command(environment: Mapping[str, str], *arguments: str) -> tuple[int, str, str]:
    """Run `millrace`; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "millrace", *arguments,
        env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def check_found(gateway: Gateway, pictures: list[SamplePicture]) -> None:
    """Each near-duplicate and its original find themselves first and each other next, however asked for."""
    for copy in pictures:
        if copy.near_duplicate_of is None:
            continue
        others = [one.id for one in pictures if one.near_duplicate_of == copy.near_duplicate_of]
        family = {copy.near_duplicate_of, *others}
        by_id = hits(await gateway.http.get(f"/v1/images/{copy.id}/similar", params={"limit": 20}))
        by_picture = hits(await gateway.http.post("/v1/search?limit=20", files=form(copy.data)))
        for found in (by_id, by_picture):
            assert next(iter(found)) == copy.id
            assert found[copy.id] > 0.9999
            nearest = list(found)[: len(family)]
            assert set(nearest) == family
            assert all(found[name] > 0.97 for name in nearest)
            assert all(
                score < 0.9 for name, score in found.items() if score and not _kin(pictures, name, copy)
            )


def _kin(pictures: list[SamplePicture], name: str, copy: SamplePicture) -> bool:
    scenes = {one.id: one.near_duplicate_of or one.id for one in pictures}
    return scenes[name] == scenes[copy.id]


async def test_the_picture_itself_is_first_and_its_near_duplicates_next(
    spine: Spine, own_installation: Installation, tmp_path: Path
) -> None:
    """By id and by upload, over HTTP and from the command line, without a trace of the queries."""
    pictures = await filled(spine, 36)
    async with serving(spine.settings) as gateway:
        await check_found(gateway, pictures)
        by_label = await gateway.http.post("/v1/search?label=dark&limit=50", files=form(pictures[0].data))
        assert set(hits(by_label)) == {one.id for one in pictures if one.expected_label == "dark"}

        # The query of a broken picture is answered at once, and is a dead letter nowhere.
        broken = pictures[0].data[:200] if pictures[0].data.startswith(b"\xff\xd8") else JPEG
        refused = await gateway.http.post("/v1/search", files=form(broken))
        assert (refused.status_code, refused.json()["code"]) == (422, "undecodable_image")

        file = tmp_path / "query.bin"
        file.write_bytes(pictures[5].data)
        here = {**own_installation.environment, "MILLRACE_GATEWAY_URL": gateway.url}
        code, out, _ = await command(here, "search", str(file), "--limit", "3", "--json")
        lines = [json.loads(line) for line in out.splitlines()]
        assert (code, len(lines), lines[0]["id"]) == (0, 3, pictures[5].id)
        assert lines[1]["id"] == pictures[5].near_duplicate_of
        code, out, err = await command(here, "search", "--id", pictures[5].id, "--limit", "36", "--exact")
        assert (code, len(out.splitlines())) == (0, 37)
        assert out.splitlines()[1].split()[:2] == ["1.0000", pictures[5].id]
        assert "builtin:fingerprint 1, 256 dimensions" in err
        assert (await command(here, "search", "--id", "nobody"))[0] == 1
        assert (await command(here, "search"))[0] == 2
        nowhere = here | {"MILLRACE_GATEWAY_URL": "http://127.0.0.1:9"}
        code, _, err = await command(nowhere, "search", "--id", "nobody")
        assert (code, "the gateway does not answer" in err) == (69, True)

    # All that was published is accounted for: nothing of any query is in results, dead letters or objects.
    await spine.settled(whole=True)
    objects = ObjectStore.open(spine.settings)
    kept = [item.key async for page in objects.list("images") for item in page]
    kept += [item.key async for page in objects.list("dead-letters") for item in page]
    assert len(kept) == len(pictures)
    objects.close()


async def test_store_keeps_the_indexes(spine: Spine) -> None:
    """`store` builds the index of a model with enough vectors when it starts, beside its work."""
    await fill(spine.database, clustered(120, 8))
    await spine.start("store", MILLRACE_SEARCH_INDEX_EMBEDDINGS="100")

    async def approximate() -> bool:
        found = await spine.database.nearest(space(8), [1.0] * 8)
        return found.mode == "approximate"

    await eventually(approximate, 30.0)
    dsn = spine.settings.resolved_database
    assert await vector_indexes.maintain(dsn, min_rows=100) == []


async def test_a_trace_tells_the_whole_way(spine: Spine, own_installation: Installation) -> None:
    """What the workers really did is told in order, with plausible times and the batch's real company."""
    pictures = await filled(spine, 12)
    code, out, err = await command(own_installation.environment, "trace", pictures[3].id, "--json")
    assert (code, err) == (0, "")
    (deployment,) = json.loads(out)["deployments"]
    steps = {step["step"]: step for step in deployment["steps"]}
    assert list(steps) == [
        "received", "queued", "decoded", "batched", "forwarded", "published", "stored",
    ]  # fmt: skip
    assert all(step["seconds"] >= 0 for step in steps.values())
    moments = [step["at"] for step in deployment["steps"]]
    assert moments == sorted(moments)
    company = steps["batched"]["batch"]
    stored = {one.id: (await spine.database.predictions(one.id))[0].prediction.receipt for one in pictures}
    mates = {name for name, receipt in stored.items() if receipt.batch_id == company["id"]}
    assert {*company.get("companions", ()), pictures[3].id} == mates
    assert len(mates) == company["size"]

    code, out, _ = await command(own_installation.environment, "trace", pictures[3].id)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(pictures[3].id)
    assert lines[2] == "default: predicted"
    assert lines[4].split()[:3] == ["0.0", "ms", "published"]
    assert (await command(own_installation.environment, "trace", "nobody"))[0] == 1
