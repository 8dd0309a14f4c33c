"""Golden records: what was ever published can be read for ever.

`tests/golden/CONTRACT/VERSION/*.json` each hold a record as Kafka has it (bytes in base64) and the event that
it means. Add files, never change one: a contract version keeps its meaning, another meaning is another version.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import deadletters, deployments, events, telemetry, topics
from pipeline.deadletters import DeadLetter
from pipeline.deployments import Desired, Status
from pipeline.events import ImageEvent, Outgoing, Prediction, Record

# Both lanes are one contract.
STEM = re.compile(r"(\.realtime|\.bulk)?\.v[0-9]+$")
GOLDEN = Path(__file__).parents[1] / "golden"
CODECS: dict[str, tuple[Any, Callable[[Record], Any], Callable[[Any], Outgoing]]] = {
    "images/v1": (ImageEvent, events.decode_image, events.encode_image),
    "predictions/v1": (Prediction, events.decode_prediction, events.encode_prediction),
    "dead-letters/v1": (DeadLetter, deadletters.decode_dead_letter, deadletters.encode_dead_letter),
    "models/v1": (Any, deployments.decode, deployments.encode),
    "gpu.samples/v1": (
        telemetry.Samples,
        lambda record: telemetry.decode_samples(record)[0],
        telemetry.encode_samples,
    ),
    "gpu.windows/v1": (telemetry.Windows, telemetry.decode_windows, telemetry.encode_windows),
    "gpu.alerts/v1": (telemetry.Alert, telemetry.decode_alert, telemetry.encode_alert),
}
FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*/*.json"))


class Golden(msgspec.Struct, forbid_unknown_fields=True):
    """One file."""

    note: str
    record: Record
    event: msgspec.Raw


def read(name: str) -> tuple[Record, Any, Callable[[Record], Any], Callable[[Any], Outgoing]]:
    golden = msgspec.json.decode((GOLDEN / name).read_bytes(), type=Golden)
    kind, decode, encode = CODECS[name.rpartition("/")[0]]
    if name.startswith("models/"):  # the key tells the two kinds apart
        kind = Status if b"/" in (golden.record.key or b"") else Desired
    return golden.record, msgspec.json.decode(golden.event, type=kind), decode, encode


@pytest.mark.parametrize("name", FILES)
def test_golden_records_decode_for_ever(name: str) -> None:
    """A record of any past release means today what it meant then."""
    record, event, decode, _ = read(name)
    assert event == decode(record)


@pytest.mark.parametrize("name", FILES)
def test_golden_events_encode_to_the_same_meaning(name: str) -> None:
    """What today's release publishes of an event is read back as that event."""
    record, event, decode, encode = read(name)
    outgoing = encode(event)
    again = msgspec.structs.replace(
        record, key=outgoing.key, value=outgoing.value, headers=outgoing.headers, partition=0, offset=0
    )
    assert event == decode(again)


def test_every_contract_has_golden_records() -> None:
    """Each topic of the table has golden records of its version."""
    stems = {STEM.sub("", topic.name) + "/" + topic.name.rpartition(".")[2] for topic in topics.TOPICS}
    assert stems == set(CODECS)
    assert set(CODECS) == {name.rpartition("/")[0] for name in FILES}
