"""The embedded Kafka and PostgreSQL: they start anywhere, keep their data, and never outlive their parent."""

import os
import signal
import socket
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from millrace import ports, processes
from millrace.folders import FolderLock
from millrace.kafka import EmbeddedKafka
from millrace.local import local_services
from millrace.postgres import EmbeddedPostgres
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.settings import Settings, load
from tests.support import services
from tests.support.eventually import eventually_sync
from tests.support.stack import stack_process

# Several starts of a Java machine, each 2 s on an idle machine, on one that runs other tests as well.
pytestmark = pytest.mark.timeout(240)

EIGHT_MEBIBYTES = 8 * 1024 * 1024
DEAD_LETTER_EXTRA_BYTES = 64 * 1024


async def create_topic(bootstrap_servers: str, topic: str, **configs: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=configs)])
    finally:
        await admin.close()


async def publish(bootstrap_servers: str, topic: str, value: bytes) -> int:
    async with AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers, enable_idempotence=True, max_request_size=2 * EIGHT_MEBIBYTES
    ) as producer:
        return int((await producer.send_and_wait(topic, value)).offset)


async def read_first(bootstrap_servers: str, topic: str) -> bytes:
    async with AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers, max_partition_fetch_bytes=2 * EIGHT_MEBIBYTES
    ) as consumer:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        consumer.seek(partition, 0)
        return bytes((await consumer.getone()).value)


async def fetch(dsn: str, query: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_kafka_needs_no_java_and_keeps_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka starts with nothing on the PATH; what it acknowledged is there after a stop and a SIGKILL."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    broker = services.embedded_kafka(tmp_path)
    broker.start()
    first_pid = broker.pid
    await create_topic(broker.bootstrap_servers, "kept")
    assert await publish(broker.bootstrap_servers, "kept", b"before") == 0

    broker.kill()
    assert (broker.running, broker.pid) == (False, None)
    broker.start()
    assert broker.pid not in (None, first_pid)
    assert await publish(broker.bootstrap_servers, "kept", b"after") == 1

    broker.stop()
    broker.stop()
    broker.start()
    try:
        assert await read_first(broker.bootstrap_servers, "kept") == b"before"
        assert await publish(broker.bootstrap_servers, "kept", b"at last") == 2
    finally:
        broker.stop()


async def test_kafka_is_set_up_as_the_design_says(kafka: str, topic_prefix: str) -> None:
    """Offsets outlive a month of absence, topics are never made by accident, and the largest record fits."""
    topic = f"{topic_prefix}large"
    largest = EIGHT_MEBIBYTES + DEAD_LETTER_EXTRA_BYTES
    await create_topic(kafka, topic, **{"max.message.bytes": str(largest + 1024)})
    assert await publish(kafka, topic, b"x" * largest) == 0
    assert len(await read_first(kafka, topic)) == largest

    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1")])
    finally:
        await admin.close()
    settings = {entry[0]: entry[1] for entry in response.resources[0][4]}
    assert int(settings["offsets.retention.minutes"]) > 31 * 24 * 60
    assert settings["auto.create.topics.enable"] == "false"
    assert settings["group.min.session.timeout.ms"] == "1000"
    assert all("127.0.0.1" in listener for listener in settings["listeners"].split(","))


async def test_postgres_keeps_its_rows(tmp_path: Path) -> None:
    """What PostgreSQL committed is there after a stop and after SIGKILL, and pgvector works."""
    server = services.embedded_postgres(tmp_path)
    server.start()
    await services.execute(server.dsn, "CREATE EXTENSION vector", "CREATE TABLE kept (embedding vector(3))")
    await services.execute(server.dsn, "INSERT INTO kept VALUES ('[1,2,3]')")
    assert await fetch(server.dsn, "SHOW fsync") == "on"

    server.kill()
    assert (server.running, server.pid) == (False, None)
    server.start()
    await services.execute(server.dsn, "INSERT INTO kept VALUES ('[4,5,6]')")
    server.stop()
    server.stop()
    server.start()
    try:
        nearest = "SELECT embedding::text FROM kept ORDER BY embedding <-> '[1,2,4]'"
        assert await fetch(server.dsn, nearest) == "[1,2,3]"
        assert await fetch(server.dsn, "SELECT count(*) FROM kept") == 2
    finally:
        server.stop()


async def test_postgres_asks_for_its_password(own_postgres: EmbeddedPostgres) -> None:
    """Another user of the machine, who cannot read the password file, cannot connect either."""
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(own_postgres.dsn.partition("?")[0], password="guess")


async def test_postgres_starts_over_a_pid_file_that_names_a_stranger(
    own_postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """A pid file left by a killed server is no obstacle when its number belongs to another process by now."""
    own_postgres.kill()
    pid_file = tmp_path / "postgres" / "data" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    # PostgreSQL believes the number only if that process belongs to the user it runs as.
    owner = pid_file.stat()
    run_as = processes.RunAs(owner.st_uid, owner.st_gid) if os.geteuid() == 0 else None
    stranger = processes.spawn(["sleep", "600"], log_path=tmp_path / "log", run_as=run_as)
    try:
        eventually_sync(lambda: processes.name_of(stranger.pid).startswith("sleep"), timeout_seconds=10)
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]))
        own_postgres.start()
        assert await fetch(own_postgres.dsn, "SELECT 1") == 1
        assert stranger.poll() is None
    finally:
        processes.stop(stranger, signal.SIGKILL, seconds=10)


def test_a_postgres_started_by_hand_is_left_alone(own_postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """A server that runs on the folder without our lock is named, with the command that ends it."""
    (tmp_path / "postgres" / ".lock").unlink()
    other = EmbeddedPostgres(tmp_path, ports.find_free())
    with pytest.raises(
        ConfigurationError, match=rf"postgres \(pid {own_postgres.pid}\).*kill -INT {own_postgres.pid}"
    ):
        other.start()
    assert own_postgres.running


def test_half_made_folders_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start killed while it made the folders, whatever their name, does not hinder the next."""
    monkeypatch.setenv("LC_ALL", "C")
    folder = tmp_path / "ä folder $x=1 & more"
    for unfinished in ("kafka/data.formatting", "postgres/data.creating"):
        (folder / unfinished).mkdir(parents=True)
        (folder / unfinished / "half").write_text("made")
    (folder / "postgres" / "password.initdb").write_text("old")
    with local_services(_settings(folder)) as started:
        assert started.kafka is not None
        assert started.kafka.running
        assert started.postgres is not None
        assert started.postgres.running
    assert not started.kafka.running
    assert not started.postgres.running
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    logs = {path.name for path in (folder / "logs").iterdir()}
    assert logs == {"kafka.log", "kafka-console.log", "postgres.log"}


def test_services_with_an_address_are_not_started(tmp_path: Path) -> None:
    """An address in the settings means somebody else's service: nothing is started or written."""
    elsewhere = {"kafka_bootstrap_servers": "elsewhere:9092", "database_url": "postgresql://elsewhere/x"}
    with local_services(_settings(tmp_path, **elsewhere)) as started:
        assert (started.kafka, started.postgres) == (None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        ("MILLRACE_KAFKA_PORT", lambda folder, port: EmbeddedKafka(folder, port, ports.find_free())),
        (
            "MILLRACE_KAFKA_CONTROLLER_PORT",
            lambda folder, port: EmbeddedKafka(folder, ports.find_free(), port),
        ),
        ("MILLRACE_POSTGRES_PORT", lambda folder, port: EmbeddedPostgres(folder, port)),
    ],
)
def test_a_port_in_use_is_one_clear_line(tmp_path: Path, setting: str, make: object) -> None:
    """A taken port is refused at once, naming the port, who holds it, and the setting to change."""
    assert callable(make)
    with socket.create_server(("127.0.0.1", ports.find_free())) as holder:
        port = holder.getsockname()[1]
        service = make(tmp_path, port)
        with pytest.raises(ConfigurationError) as raised:
            service.start()
    assert not service.running
    message = raised.value.message
    assert "\n" not in message
    assert f"port {port} is already in use by {processes.name_of(os.getpid())}" in message
    assert setting in message


def test_a_start_that_fails_says_why_and_lets_go(tmp_path: Path) -> None:
    """A broker that cannot start is an error with the end of its log, and another start can follow."""
    kafka_port, controller_port = ports.find_free(), ports.find_free()
    broken = EmbeddedKafka(tmp_path, kafka_port, controller_port, properties={"num.io.threads": "none"})
    with pytest.raises(DependencyError, match=r"(?s)logs/kafka.*num\.io\.threads"):
        broken.start()
    assert not broken.running

    mended = EmbeddedKafka(tmp_path, kafka_port, controller_port)
    mended.start()
    mended.stop()

    # Formatted by now, so this time the broker itself ends.
    with pytest.raises(DependencyError, match=r"(?s)ended with code 1; see .*logs/kafka.*num\.io\.threads"):
        broken.start()
    assert not broken.running


async def test_one_folder_belongs_to_one_stack_and_outlives_its_kill(tmp_path: Path) -> None:
    """A second stack is refused, naming the first; after SIGKILL of the first the folder is free at once."""
    chosen = [ports.find_free() for _ in range(3)]
    with stack_process(tmp_path, *chosen) as (first, children):
        second = (
            EmbeddedKafka(tmp_path, ports.find_free(), ports.find_free()),
            EmbeddedPostgres(tmp_path, ports.find_free()),
        )
        for service in second:
            with pytest.raises(
                ConfigurationError, match=rf"in use by .*\(pid {first.pid}\).*kill {first.pid}.*DATA_DIR"
            ):
                service.start()
        assert [processes.is_alive(pid) for pid in children] == [True, True]
        backends = processes.children_of(children[1])
        first.kill()
        first.wait()
        # At once, on the same ports: as a person would who starts it again.
        third = (EmbeddedKafka(tmp_path, chosen[0], chosen[1]), EmbeddedPostgres(tmp_path, chosen[2]))
        try:
            for service in third:
                service.start()
            assert [pid for pid in [*children, *backends] if processes.is_alive(pid)] == []
            assert await fetch(third[1].dsn, "SELECT 1") == 1
        finally:
            for service in third:
                service.stop()


def test_a_child_left_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that outlived its stack all the same keeps the folder, and the error says how to end it."""
    monkeypatch.setattr("millrace.folders._DYING_SECONDS", 0.2)
    dead = processes.spawn(["true"], log_path=tmp_path / "log")
    dead.wait()
    earlier = FolderLock(tmp_path / "kafka" / ".lock")
    child = processes.spawn(["sleep", "600"], log_path=tmp_path / "log", pass_fds=(earlier.acquire(),))
    earlier.record(dead.pid, child.pid)
    earlier.release()
    try:
        with pytest.raises(ConfigurationError, match=rf"in use by .*pid {child.pid}.*\(kill {child.pid}\)"):
            services.embedded_kafka(tmp_path).start()
    finally:
        processes.stop(child, signal.SIGKILL, seconds=10)
    afterwards = FolderLock(tmp_path / "kafka" / ".lock")
    afterwards.acquire()
    afterwards.release()


def test_a_damaged_folder_says_what_to_do(tmp_path: Path) -> None:
    """Folders that cannot be used as they are end in one line that names them and the way out."""
    (tmp_path / "kafka" / "data").mkdir(parents=True)
    (tmp_path / "postgres" / "data").mkdir(parents=True)
    for service in (services.embedded_kafka(tmp_path), services.embedded_postgres(tmp_path)):
        with pytest.raises(ConfigurationError, match=rf"{tmp_path}.*move .* away"):
            service.start()


def _settings(data_dir: Path, **others: str) -> Settings:
    numbers = {name: ports.find_free() for name in ("kafka_port", "kafka_controller_port", "postgres_port")}
    return load(data_dir=data_dir, **numbers, **others)
