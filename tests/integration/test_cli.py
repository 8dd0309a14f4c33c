"""The command line against a real broker and a real database, as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.images import draw
from pipeline import broker, deadletters, events
from pipeline.database import Database
from pipeline.errors import UndecodableImageError
from pipeline.objects import ObjectStore
from pipeline.settings import Settings, load
from pipeline.topics import IMAGES_BULK, MAX_INLINE_IMAGE_BYTES, PREDICTIONS, TOPICS
from tests.support.services import run_apart

JPEG = b"\xff\xd8\xff\xe0" + b"x" * 1000


@dataclass
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON objects on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Millrace:
    """The command line of one installation."""

    environment: dict[str, str]
    folder: Path
    settings: Settings

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "millrace", *map(str, arguments)],
            env=self.environment, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str | Path) -> Ran:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return Ran(process.returncode, out, err)


Install = Callable[[str, str], Millrace]


@pytest.fixture
def install(tmp_path: Path, topic_prefix: str) -> Install:
    """Make an installation with addresses of a broker and a database."""

    def make(kafka: str, database: str) -> Millrace:
        values = {
            "kafka_bootstrap_servers": kafka,
            "database_url": database,
            "object_store_url": str(tmp_path / "objects"),
            "topic_prefix": topic_prefix,
            "data_dir": str(tmp_path / "data"),
            "topic_partitions": "1",
        }
        # Python's own paths: the package may be run from the checkout, not installed.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {f"MILLRACE_{name.upper()}": value for name, value in values.items()}
        return Millrace(environment, tmp_path, load(**values))

    return make


@pytest.fixture
def millrace(install: Install, kafka: str, database: str) -> Millrace:
    """Return an installation with topics and tables."""
    made = install(kafka, database)
    run_apart(broker.apply_topics(made.settings))
    return made


@pytest.fixture
def nowhere(install: Install) -> Millrace:
    """Return an installation whose broker and database are not there."""
    return install("127.0.0.1:9", "postgresql://nobody@127.0.0.1:9/none")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Make a folder as people have them."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for picture in draw(5, 4):
        (folder / "below" / f"{picture.id}.bin").write_bytes(picture.data)
    (folder / "large.jpg").write_bytes(JPEG + b"x" * MAX_INLINE_IMAGE_BYTES)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("skipped")
    return folder


def records(millrace: Millrace, topic: str) -> list[events.Record]:
    async def read() -> list[events.Record]:
        from pipeline.readers import read_all

        return await read_all(millrace.settings, millrace.settings.topic(topic))

    return run_apart(read())


def with_database(millrace: Millrace, use: Callable[[Database], Any]) -> Any:
    async def run() -> Any:
        database = await Database.open(millrace.settings)
        try:
            return await use(database)
        finally:
            await database.close()

    return run_apart(run())


def test_a_folder_is_published_and_each_file_accounted_for(millrace: Millrace, pictures: Path) -> None:
    """Every file is published, failed or skipped, and says so; large ones go by way of the object store."""
    ran = millrace("publish", "images", pictures, pictures / "gone.jpg", "--json")
    assert ran.code == 1
    by_name = {Path(line["path"]).name: line for line in ran.lines}
    assert len(by_name) == len(ran.lines) == 9
    assert by_name["notes.txt"]["skipped"]
    assert {name for name, line in by_name.items() if "error" in line} == {
        "broken.jpg",
        "empty.png",
        "gone.jpg",
    }
    published = {line["id"]: line for line in ran.lines if "offset" in line}
    assert "published 5 pictures" in ran.err
    assert "3 failed; 1 skipped" in ran.err
    for reason in ("broken.jpg: its first bytes", "empty.png: the file is empty", "gone.jpg: No such file"):
        assert reason in ran.err
    found = {
        events.decode_image(record).id: events.decode_image(record)
        for record in records(millrace, IMAGES_BULK.name)
    }
    assert set(found) == set(published)
    large = found[by_name["large.jpg"]["id"]]
    assert (large.data, large.dataref is not None) == (b"", True)
    stored = run_apart(_get(millrace.settings, large.dataref or ""))
    assert stored == (pictures / "large.jpg").read_bytes()


def test_a_pipe_is_never_opened(millrace: Millrace) -> None:
    """A pipe among the files, which nobody writes to, is skipped, and a failure where it is named."""
    pipe = millrace.folder / "pipes" / "holiday.jpg"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    ran = millrace("publish", "images", pipe.parent, "--json")
    assert (ran.code, [line["skipped"] for line in ran.lines]) == (0, ["not a regular file"])
    ran = millrace("publish", "images", pipe, "--json")
    assert (ran.code, [line["error"] for line in ran.lines]) == (1, ["not a regular file"])


async def _get(settings: Settings, key: str) -> bytes:
    store = ObjectStore.open(settings)
    try:
        return await store.get(key, max_bytes=10**8)
    finally:
        store.close()


def test_publishing_twice_gives_the_same_ids(millrace: Millrace, pictures: Path) -> None:
    """Ids come from the bytes by default, from the path or from nothing when told so."""
    folder = pictures / "below"

    def ids(*options: str) -> list[str]:
        ran = millrace("publish", "images", folder, "--json", *options)
        assert ran.code == 0
        return sorted(line["id"] for line in ran.lines)

    assert ids() == ids("--lane", "realtime")
    assert ids("--id-from", "path") == sorted(path.name for path in folder.iterdir())
    assert not set(ids("--id-from", "random")) & set(ids("--id-from", "random"))


def test_limit_rate_and_deadline_are_kept(millrace: Millrace, pictures: Path) -> None:
    """No more pictures than the limit, no faster than the rate, each with its deadline; nothing else on stdout."""
    begun = time.monotonic()
    ran = millrace(
        "publish", "images", pictures / "below", "--limit", "3", "--rate", "4", "--deadline-seconds", "60"
    )
    assert time.monotonic() - begun >= 0.5
    assert (ran.code, ran.out) == (0, "")
    found = [events.decode_image(record) for record in records(millrace, IMAGES_BULK.name)]
    assert len(found) == 3
    for event in found:
        assert event.time is not None
        assert event.expires_at is not None
        assert (event.expires_at - event.time).total_seconds() == pytest.approx(60)


def test_commands_without_their_service_end_with_69(nowhere: Millrace, pictures: Path) -> None:
    """A broker or database that is not there is one line and exit code 69, never a traceback."""
    for command in (
        ["publish", "images", pictures],
        ["lag"],
        ["topics"],
        ["predictions", "tail"],
        ["predictions", "get", "x"],
        ["dead-letters", "list"],
        ["migrate"],
        ["retention"],
    ):
        ran = nowhere(*command)
        assert ran.code == 69, command
        assert "127.0.0.1" in ran.err
        assert "Traceback" not in ran.err
        assert len(ran.err.splitlines()) <= 2


def test_doctor_finds_what_is_missing(millrace: Millrace, nowhere: Millrace) -> None:
    """Doctor ends with 0 where all is well and with 1 where a configured service is missing, saying what to do."""
    ran = millrace("doctor", "--json")
    assert {line["check"]: line["status"] for line in ran.lines if line["status"] != "ok"} == {
        "gateway": "off"
    }
    assert ran.code == 0
    ran = nowhere("doctor")
    assert ran.code == 1
    assert "MILLRACE_KAFKA_BOOTSTRAP_SERVERS" in ran.out
    assert "MILLRACE_DATABASE_URL" in ran.out
    nowhere.environment["MILLRACE_KAFKA_PORT"] = "none"
    ran = nowhere("doctor", "--json")
    assert ran.code == 1
    assert "MILLRACE_KAFKA_PORT" in next(line["detail"] for line in ran.lines if line["check"] == "settings")


def test_topics_and_lag_tell_what_the_broker_has(
    install: Install, kafka: str, database: str, pictures: Path
) -> None:
    """Topics are missing, then created; lag counts what a group that never ran has before it."""
    millrace = install(kafka, database)
    assert {line["state"] for line in millrace("topics", "--json").lines} == {"missing"}
    assert [line["change"] for line in millrace("topics", "apply", "--json").lines] == ["created"] * len(
        TOPICS
    )
    assert {line["state"] for line in millrace("topics", "list", "--json").lines} == {"ok"}
    assert millrace("publish", "images", pictures / "below").code == 0
    rows = {(row["group"], row["topic"]): row for row in millrace("lag", "--json").lines}
    row = rows[millrace.settings.group("archive"), millrace.settings.topic(IMAGES_BULK.name)]
    assert (row["committed"], row["lag"]) == (None, 4)
    table = millrace("lag", "--total", "--group", millrace.settings.group("archive")).out.splitlines()
    assert table[0].split() == ["GROUP", "TOPIC", "PARTITIONS", "LAG"]
    assert [line.split()[-1] for line in table[1:]] == ["4", "0"]


def prediction(image_id: str) -> events.Prediction:
    return events.Prediction(
        id=events.prediction_id(image_id, "default", (("builtin:quality", "1"),)),
        image_id=image_id, deployment="default", lane="bulk", outcome="predicted", time=datetime.now(UTC),
        receipt=events.Receipt(topic="t", partition=0, offset=1, batch_size=8, queue_seconds=0.003),
        models=(events.ModelResult(
            model="builtin:quality", version="1", digest="0", task="score", label="keep", score=0.93),),
    )  # fmt: skip


def test_an_image_is_looked_up_and_waited_for(millrace: Millrace) -> None:
    """`predictions get` ends with 1 until there is a prediction, waits when told to, and shows it."""
    assert millrace("predictions", "get", "cat-1").code == 1
    waiting = millrace.start("predictions", "get", "cat-1", "--wait", "30", "--json")
    time.sleep(1.0)
    with_database(millrace, lambda database: database.save([prediction("cat-1")], []))
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0
    found = json.loads(out)
    assert (found["id"], found["state"]) == ("cat-1", "predicted")
    assert found["predictions"][0]["models"][0]["label"] == "keep"
    ran = millrace("predictions", "get", "cat-1")
    assert ran.code == 0
    assert ran.out.startswith("cat-1  predicted\n")


def test_tail_prints_predictions_until_interrupted(millrace: Millrace) -> None:
    """`predictions tail` prints each as a line; Ctrl-C ends it with 130, a reader that goes away with 141."""

    async def publish(number: int, **changes: Any) -> None:
        publisher = broker.Publisher(millrace.settings, client_id="test")
        await publisher.start()
        said = msgspec.structs.replace(prediction(f"cat-{number}"), **changes)
        encoded = events.encode_prediction(said)
        await publisher.publish(millrace.settings.topic(PREDICTIONS.name), encoded)
        await publisher.stop()

    run_apart(publish(0, purpose=events.QUERY))  # somebody searched with a picture
    run_apart(publish(1))
    for option, first in (((), "cat-1"), (("--queries",), "cat-0")):
        ran = millrace("predictions", "tail", "--from", "earliest", "--limit", "1", "--json", *option)
        assert (ran.code, ran.lines[0]["image_id"]) == (0, first)
    for ends in ("interrupted", "reader gone"):
        tail = millrace.start("predictions", "tail", "--from", "earliest")
        assert tail.stdout is not None
        line = tail.stdout.readline()
        assert line.split()[:5] == ["cat-1", "bulk", "default", "keep", "0.93"]
        if ends == "interrupted":
            tail.send_signal(signal.SIGINT)
        else:
            tail.stdout.close()
        assert tail.wait(10) == (130 if ends == "interrupted" else 141)
        assert tail.stderr is not None
        assert tail.stderr.read() == ""
        tail.stdout.close()
        tail.stderr.close()


def dead_letter(
    millrace: Millrace, offset: int, value: bytes | None, **fields: Any
) -> deadletters.DeadLetter:
    record = events.Record(
        topic=millrace.settings.topic(IMAGES_BULK.name), partition=0, offset=offset, timestamp_ms=1,
        key=b"cat", value=value, headers=(("ce_id", b"cat-%d" % offset), ("note", b"caf\xc3\xa9")),
    )  # fmt: skip
    letter = deadletters.from_error(
        fields.pop("group", millrace.settings.group("predict")),
        record,
        UndecodableImageError("broken"),
        datetime.now(UTC),
    )
    return deadletters.DeadLetter(
        **{name: getattr(letter, name) for name in letter.__struct_fields__} | fields
    )


def test_dead_letters_are_listed_shown_and_redriven(millrace: Millrace) -> None:
    """A redriven record keeps id and bytes, addresses its group, counts attempts, and its dead letter is closed."""
    key = "dead-letters/aa/" + "a" * 64
    store = ObjectStore.open(millrace.settings)
    run_apart(store.put(key, b"kept elsewhere"))
    store.close()
    letters = [
        dead_letter(millrace, 1, b"value"),
        dead_letter(millrace, 2, None, value_ref=key),
        dead_letter(millrace, 3, b"other", group=millrace.settings.group("archive")),
        dead_letter(millrace, 4, None, value_ref="dead-letters/bb/" + "b" * 64),
    ]
    with_database(millrace, lambda database: database.save([], letters))
    group = millrace.settings.group("predict")
    listed = millrace("dead-letters", "list", "--group", group, "--json").lines
    assert [line["offset"] for line in listed] == [4, 2, 1]
    number = str(listed[-1]["number"])
    shown = millrace("dead-letters", "show", number, "--json", "--save-value", "value.bin")
    assert (millrace.folder / "value.bin").read_bytes() == b"value"
    assert ["note", "café"] in shown.lines[0]["headers"]
    assert "undecodable_image" in millrace("dead-letters", "list").out

    asked = millrace("dead-letters", "redrive", "--all", "--group", group)
    assert asked.code == 1
    assert "--yes" in asked.err
    assert records(millrace, IMAGES_BULK.name) == []

    ran = millrace("dead-letters", "redrive", "--all", "--group", group, "--yes", "--json")
    assert ran.code == 1  # the value of the fourth is gone
    assert [line["image_id"] for line in ran.lines if "error" in line] == ["cat-4"]
    found = {record.header("ce_id"): record for record in records(millrace, IMAGES_BULK.name)}
    assert {image_id: record.value for image_id, record in found.items()} == {
        b"cat-1": b"value", b"cat-2": b"kept elsewhere",
    }  # fmt: skip
    record = found[b"cat-1"]
    assert (events.only_group(record), events.attempts(record), record.key) == (group, 1, b"cat")
    assert [line["offset"] for line in millrace("dead-letters", "list", "--json").lines] == [4, 3]
    again = millrace("dead-letters", "redrive", number)
    assert again.code == 1
    assert "already" in again.err


def test_retention_counts_before_it_deletes(millrace: Millrace) -> None:
    """A dry run counts and keeps, a run deletes what is older and keeps the rest."""
    with_database(millrace, lambda database: database.save([prediction("cat-1")], []))
    assert (
        millrace("retention", "--older-than", "1h", "--dry-run", "--json").lines[0]["removed"]["predictions"]
        == 0
    )
    counted = millrace("retention", "--older-than", "0s", "--dry-run", "--json").lines[0]
    assert (counted["dry_run"], counted["removed"]["predictions"]) == (True, 1)
    assert millrace("predictions", "get", "cat-1").code == 0
    assert millrace("retention", "--older-than", "0s", "--json").lines[0]["removed"]["predictions"] == 1
    assert millrace("predictions", "get", "cat-1").code == 1


def test_an_interrupted_publication_says_how_far_it_came(millrace: Millrace, pictures: Path) -> None:
    """Ctrl-C ends publishing cleanly: 130, what was published is counted, no traceback."""
    process = millrace.start("publish", "images", pictures / "below", "--rate", "0.5", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "published 1 picture in" in err
    assert "Traceback" not in err


def test_migrate_is_idempotent(millrace: Millrace) -> None:
    """Migrating a migrated database applies nothing."""
    ran = millrace("migrate", "--json")
    assert (ran.code, ran.out) == (0, "")
    assert "up to date" in ran.err


def test_missing_topics_are_told_with_the_way_out(millrace: Millrace) -> None:
    """Publishing to topics that are missing ends with 69 and the command that creates them."""
    millrace.environment["MILLRACE_TOPIC_PREFIX"] = millrace.settings.topic_prefix + "other-"
    (millrace.folder / "cat.jpg").write_bytes(JPEG)
    ran = millrace("publish", "images", millrace.folder / "cat.jpg")
    assert ran.code == 69
    assert "millrace topics apply" in ran.err
