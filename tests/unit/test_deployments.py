"""What `models.v1` means: garbage is refused, the latest record of a key counts, replicas stand to a version."""

from datetime import timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import deployments, examples
from pipeline.deployments import (
    SILENT_SECONDS,
    Desired,
    Refusal,
    Registry,
    Running,
    Status,
    Version,
    check_models,
)
from pipeline.errors import ConfigurationError, ContractError
from pipeline.events import Outgoing, Record

NOW = examples.TIME
Replace = msgspec.structs.replace


def record(outgoing: Outgoing, offset: int = 0) -> Record:
    return Record(
        topic="models.v1", partition=0, offset=offset, timestamp_ms=0, key=outgoing.key, value=outgoing.value,
        headers=outgoing.headers,
    )  # fmt: skip


def desired(revision: int, *models: str, predecessor: Version | None = None) -> Desired:
    version = Version(revision=revision, models=models or (f"builtin:{revision}",))
    return Desired(
        deployment="default", version=version, activated_by="t", activated_at=NOW, predecessor=predecessor
    )


def status(replica: str = "r", **values: object) -> Status:
    return Status(**{"deployment": "default", "replica": replica, "time": NOW} | values)  # type: ignore[arg-type]


KEYS = st.sampled_from([b"default", b"wildlife", b"default/r", b"default/", b"/", b"", b"\xff", None])
VALUES = st.one_of(
    st.none(),
    st.binary(max_size=40),
    st.sampled_from(
        [deployments.encode(value).value for value in (desired(1), desired(2), status(revision=1))]
    ),
    st.dictionaries(st.sampled_from(["deployment", "version", "time"]), st.integers()).map(
        msgspec.json.encode
    ),
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=20))
def test_a_reader_and_one_that_starts_later_agree(
    given_records: list[tuple[bytes | None, bytes | None]],
) -> None:
    """Reading everything that is on the topic, and only the last readable record of each key, is the same."""
    read_along, latest = Registry(), {}
    for offset, (key, value) in enumerate(given_records):
        one = Record(topic="m", partition=0, offset=offset, timestamp_ms=0, key=key, value=value)
        try:
            read_along.apply(one)
        except ContractError:
            continue
        latest[key] = one
    started_later = Registry()
    for one in latest.values():
        started_later.apply(one)
    assert list(read_along) == list(started_later)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        (b"default", {"ce_type": b"millrace.models.desired.v2"}, "ce_type"),
        (b"default", {"ce_type": b"millrace.models.status.v1"}, "ce_type"),
        (b"wildlife", {}, "not that of its value"),
        (b"default/r", {}, "ce_type"),
    ],
)
def test_what_is_not_meant_is_refused(key: bytes, change: dict[str, bytes], words: str) -> None:
    """Another contract version, another kind, or a key that is not the value's is an error and changes nothing."""
    outgoing = deployments.encode(desired(1))
    headers = tuple((dict(outgoing.headers) | change).items())
    registry = Registry()
    with pytest.raises(ContractError, match=words):
        registry.apply(record(Outgoing(key, outgoing.value, headers)))
    assert list(registry) == []


@pytest.mark.parametrize(
    "bad", [desired(1, ""), desired(1, "a\x00b"), desired(1, "x" * 2000), Replace(desired(1), note="a\nb"),
            Replace(desired(1), deployment="Not A Name")],
)  # fmt: skip
def test_nothing_is_published_that_cannot_be_read(bad: Desired) -> None:
    """What breaks the contract is refused before it is on the topic."""
    with pytest.raises(ContractError):
        deployments.encode(bad)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (status(), "waits"),
        (status(loading=2, attempts=1), "loads"),
        (status(revision=1, loading=2), "loads"),
        (status(revision=2), "runs"),
        (status(revision=1), "waits"),
        (status(revision=1, refused=Refusal(2, "no", NOW)), "refused"),
        (status(revision=2, refused=Refusal(1, "no", NOW)), "runs"),
        (status(revision=1, refused=Refusal(1, "no", NOW)), "waits"),
        (status(revision=2, time=NOW - timedelta(seconds=SILENT_SECONDS + 1)), "silent"),
    ],
)
def test_how_a_replica_stands(said: Status, state: str) -> None:
    """A replica runs, loads, has refused or waits for the desired version, or is not heard of."""
    running = Running("default", desired(2), {"r": said})
    assert running.state(said, NOW) == state
    assert running.is_settled(NOW) == (state in {"runs", "refused", "silent"})


def test_a_replica_that_ended_is_forgotten() -> None:
    """The tombstone of a replica, and of a version, takes it out of the state."""
    registry = Registry()
    registry.apply(record(deployments.encode(desired(1))))
    registry.apply(record(deployments.encode(status(revision=1))))
    assert list(registry["default"].replicas) == ["r"]
    registry.apply(record(deployments.tombstone("default/r")))
    assert registry["default"].replicas == {}
    registry.apply(record(deployments.tombstone("default")))
    assert "default" not in registry


def test_garbage_over_a_version_is_kept_in_mind() -> None:
    """What is written over a version is told until another is there; the readable one counts while it is kept."""
    garbage = record(Outgoing(b"default", b"{", ()))
    read_along, started_later = Registry(), Registry()
    read_along.apply(record(deployments.encode(desired(1))))
    for registry in (read_along, started_later):
        with pytest.raises(ContractError):
            registry.apply(garbage)
        with pytest.raises(ContractError):
            registry.apply(record(Outgoing(b"Not A Name", b"{", ())))
        assert list(registry.unreadable) == ["default"]
        assert "not a record of models.v1" in registry.unreadable["default"]
    assert read_along["default"].revision == 1
    assert started_later["default"].desired is None
    for registry, healing in (
        (read_along, deployments.encode(desired(2))),
        (started_later, deployments.tombstone("default")),
    ):
        registry.apply(record(healing))
        assert registry.unreadable == {}


REFUSES_2 = status("a", revision=1, refused=Refusal(2, "no", NOW))


@pytest.mark.parametrize(
    ("statuses", "revision"),
    [((), 2), ((REFUSES_2,), 1), ((REFUSES_2, status("b", revision=2)), 2), ((status("b", revision=1),), 2)],
)
def test_a_version_that_nobody_can_run_is_no_predecessor(statuses: tuple[Status, ...], revision: int) -> None:
    """The next version falls back to the present one, or to the one before if replicas only refuse it."""
    present = desired(2, predecessor=desired(1).version)
    running = Running("default", present, {said.replica: said for said in statuses})
    good = running.good_version()
    assert good is not None
    assert good.revision == revision


def test_revisions_count_up_past_everything_known() -> None:
    """After somebody wrote over the desired version, numbers that replicas have seen are not used again."""
    assert Running("default").next_revision == 1
    running = Running("default", desired(2), {"a": status("a", revision=7), "b": REFUSES_2})
    assert running.next_revision == 8


@pytest.mark.parametrize("text", ["", " , ", "quality", "builtin:", "pickle:x", "builtin:quality,nothing"])
def test_what_names_no_model_is_refused(text: str) -> None:
    """A specification without a known source is a clear error before anything is published."""
    with pytest.raises(ConfigurationError):
        check_models(text)
    assert check_models(" builtin:a , hf:b/c?x=1 ") == ["builtin:a", "hf:b/c?x=1"]
