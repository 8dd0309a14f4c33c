"""The pure parts of the one-machine stack, and the tests' own way of waiting."""

import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace import jars, ports, probe, processes
from millrace.folders import FolderLock, require_stack_folder, require_unused
from millrace.kafka import EmbeddedKafka, new_cluster_id
from millrace.postgres import database_url
from millrace.supervisor import Backoff
from pipeline.errors import ConfigurationError
from tests.support import services
from tests.support.eventually import eventually, eventually_sync


@given(st.lists(st.floats(min_value=0, max_value=120), max_size=20))
def test_backoff_grows_to_its_limit_and_forgets_after_health(runs: list[float]) -> None:
    """A pause doubles after short runs up to the most, and starts anew after long ones."""
    backoff = Backoff(first_seconds=1, most_seconds=30, healthy_seconds=60)
    pause = 0.0
    for ran_seconds in runs:
        before, pause = pause, backoff.next_pause(pause, ran_seconds)
        if before == 0 or ran_seconds >= 60:
            assert pause == 1
        else:
            assert pause == min(2 * before, 30)


def test_cluster_ids_are_what_kafka_takes() -> None:
    """A cluster id is 22 characters of URL-safe base64, is no option, and never repeats."""
    ids = [new_cluster_id() for _ in range(2000)]
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{21}", each) for each in ids)
    assert len(set(ids)) == len(ids)


def test_objects_are_put_only_where_a_stack_runs(tmp_path: Path) -> None:
    """A data folder counts as the running stack's while its Kafka holds the lock, not before and not after."""

    def refused() -> str:
        with pytest.raises(ConfigurationError) as caught:
            require_stack_folder(tmp_path)
        return caught.value.message

    assert "MILLRACE_DATA_DIR" in refused()
    lock = FolderLock(tmp_path / "kafka" / ".lock")
    lock.acquire()
    require_stack_folder(tmp_path)
    lock.release()
    assert str(tmp_path) in refused()


def test_a_second_start_in_one_folder_names_the_first(tmp_path: Path) -> None:
    """Who starts a stack where one runs is told its process, and may start when it is gone."""
    lock = FolderLock(tmp_path / "kafka" / ".lock")
    lock.acquire()
    with pytest.raises(ConfigurationError, match=f"in use by .*pid {os.getpid()}"):
        require_unused(tmp_path)
    lock.release()
    require_unused(tmp_path)


def test_every_jar_is_pinned() -> None:
    """Each pin is a SHA-256 and an exact coordinate, and Kafka's are all of the one version."""
    pins = jars._read_pins()
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in pins.values())
    assert all(re.fullmatch(r"[\w.-]+:[\w.-]+:\d[\w.-]*", coordinate) for coordinate in pins)
    kafka = {coordinate.rsplit(":")[-1] for coordinate in pins if coordinate.startswith("org.apache.kafka:")}
    assert kafka == {jars.KAFKA_VERSION}
    assert set(jars._ROOTS) <= set(pins)
    assert len({jars._file_name(coordinate) for coordinate in pins}) == len(pins)


def metadata(*hosts: bytes, cluster_id: bytes) -> bytes:
    """Encode a Metadata response, version 4, as the Kafka protocol guide lays it out."""
    brokers = b"".join(
        struct.pack(">ih", node, len(host)) + host + struct.pack(">ih", 9092, -1)
        for node, host in enumerate(hosts)
    )
    cluster = struct.pack(">h", len(cluster_id)) + cluster_id
    return struct.pack(">iii", 1, 0, len(hosts)) + brokers + cluster + struct.pack(">ii", 0, 0)


def test_a_broker_serves_once_it_lists_itself() -> None:
    """An answer with brokers gives the cluster's id; that of a broker which still starts gives none."""
    assert probe._read_metadata(metadata(b"127.0.0.1", b"x", cluster_id=b"abc")) == "abc"
    assert probe._read_metadata(metadata(cluster_id=b"abc")) is None


def test_equal_ports_are_refused(tmp_path: Path) -> None:
    """One port for clients and controller is a wrong setting that names both variables."""
    with pytest.raises(ConfigurationError, match=r"MILLRACE_KAFKA_PORT and MILLRACE_KAFKA_CONTROLLER_PORT"):
        EmbeddedKafka(tmp_path, 4000, 4000).start()


def test_free_ports_are_none_that_clients_get() -> None:
    """A found port lies below the kernel's range, so that no client can connect to itself on it."""
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(10_000 <= ports.find_free() < first_of_kernel for _ in range(20))


def test_the_database_url_holds_no_secret_and_survives_odd_folders() -> None:
    """The URL names the password's file, quoted, instead of the password."""
    url = database_url(Path("/a b/ü&c"), 5440)
    assert url == "postgresql://postgres@127.0.0.1:5440/millrace?passfile=/a%20b/%C3%BC%26c/postgres/pgpass"
    other = services.with_database(url, "other")
    assert other == url.replace("/millrace?", "/other?")


def test_the_end_of_a_log_leaves_out_stack_frames(tmp_path: Path) -> None:
    """An error shows the last lines that say something, and nothing for a log that is not there."""
    log = tmp_path / "log"
    log.write_text("first\nsecond\nthe reason\n\tat java.base/Some.method\n\tat Other.method\n")
    assert processes.tail(log, lines=2) == "second\nthe reason"
    assert processes.tail(tmp_path / "none") == ""


async def test_eventually_returns_what_became_true() -> None:
    """Waiting ends with the first true answer, whether the check is a function or a coroutine function."""
    answers = iter([None, 0, "yes"])
    assert await eventually(lambda: next(answers), timeout_seconds=1) == "yes"

    async def check() -> int:
        return 7

    assert await eventually(check, timeout_seconds=1) == 7


async def test_eventually_tells_the_last_failure() -> None:
    """Waiting in vain is an AssertionError with the last answer, caused by the last failed assertion."""

    def fail() -> bool:
        raise AssertionError("two is not three")

    with pytest.raises(AssertionError, match=r"not within 0 s") as raised:
        await eventually(fail, timeout_seconds=0)
    assert "two is not three" in str(raised.value.__cause__)
    with pytest.raises(AssertionError, match=r"last result is 0"):
        eventually_sync(lambda: 0, timeout_seconds=0)


def test_eventually_lets_other_errors_through() -> None:
    """A check that breaks is a broken test, not a reason to wait."""
    with pytest.raises(ZeroDivisionError):
        eventually_sync(lambda: 1 // 0, timeout_seconds=60)
