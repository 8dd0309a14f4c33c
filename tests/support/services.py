"""Where tests get their Kafka and PostgreSQL from, and how the processes of one test run share them.

In this order: the address in `MILLRACE_TEST_KAFKA` or `MILLRACE_TEST_DATABASE`; containers, if
`MILLRACE_TEST_CONTAINERS=1` and Docker answers; else embedded ones on free ports. A service that cannot be
had is an error, never a skip. The first process of a run that asks starts the service, and it waits at its
end for the others that use it (`Share`), as embedded services die with the process that started them.
"""

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from millrace import ports
from millrace.kafka import EmbeddedKafka
from millrace.postgres import EmbeddedPostgres
from tests.support.java import ClassDump

T = TypeVar("T")

_KAFKA_IMAGE = "confluentinc/cp-kafka:8.1.0"
_POSTGRES_IMAGE = "pgvector/pgvector:pg18"


@dataclass(frozen=True)
class Service:
    """A running service: where it is and how to end it."""

    address: str
    stop: Callable[[], None]


class Share:
    """One service for all processes of a test run (pytest-xdist), started by the first that asks.

    Two lock files: `mutex` serialises starting and stopping, `users` is held shared by everybody who has the
    address. The process that started the service stops it once it can hold `users` alone.
    """

    def __init__(self, folder: Path, name: str, start: Callable[[Path], Service]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = name
        self._start = start
        self._service: Service | None = None
        self._use: IO[str] | None = None

    def address(self) -> str:
        """Return the service's address, starting it if no other process has."""
        with self._locked("mutex"):
            known = self._folder / f"{self._name}.address"
            if not known.exists():
                self._service = self._start(self._folder / self._name)
                known.write_text(self._service.address)
            if self._use is None:
                self._use = (self._folder / f"{self._name}.users").open("w")
                fcntl.flock(self._use, fcntl.LOCK_SH)
            return known.read_text()

    def release(self) -> None:
        """Give up the use of the service."""
        if self._use is not None:
            self._use.close()
            self._use = None

    def stop(self) -> None:
        """Stop the service if this process started it, once no process uses it; blocks until then."""
        self.release()
        if self._service is not None:
            with self._locked("users"), self._locked("mutex"):
                (self._folder / f"{self._name}.address").unlink()
                self._service.stop()
                self._service = None

    @contextlib.contextmanager
    def _locked(self, which: str) -> Any:
        with (self._folder / f"{self._name}.{which}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def close(shares: list[Share]) -> None:
    """Give up all uses, then stop what this process started: two processes never wait for each other."""
    for share in shares:
        share.release()
    for share in shares:
        share.stop()


def start_kafka(folder: Path) -> Service:
    """Find or start a Kafka broker."""
    if address := os.environ.get("MILLRACE_TEST_KAFKA"):
        return Service(address, lambda: None)
    if _containers_wanted():
        from testcontainers.community.kafka import KafkaContainer

        container = KafkaContainer(_KAFKA_IMAGE).with_kraft()
        container.with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
        container.with_env("KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS", "1000")
        container.with_env("KAFKA_MESSAGE_MAX_BYTES", str(10 * 1024 * 1024))
        container.start()
        return Service(container.get_bootstrap_server(), container.stop)
    kafka = embedded_kafka(folder)
    kafka.start()
    assert kafka.pid is not None
    dump = ClassDump(kafka.pid, folder.parent)

    def stop() -> None:
        dump.stop()
        kafka.stop()

    return Service(kafka.bootstrap_servers, stop)


def start_postgres(folder: Path) -> Service:
    """Find or start a PostgreSQL server; the address is the URL of a user who may create databases."""
    if address := os.environ.get("MILLRACE_TEST_DATABASE"):
        return Service(address, lambda: None)
    if _containers_wanted():
        from testcontainers.community.postgres import PostgresContainer

        container = PostgresContainer(_POSTGRES_IMAGE, driver=None)
        container.start()
        return Service(container.get_connection_url(), container.stop)
    postgres = embedded_postgres(folder)
    postgres.start()
    return Service(postgres.dsn, postgres.stop)


def embedded_kafka(folder: Path) -> EmbeddedKafka:
    """Prepare a broker on free ports, not started."""
    return EmbeddedKafka(folder, ports.find_free(), ports.find_free())


def embedded_postgres(folder: Path) -> EmbeddedPostgres:
    """Prepare a database server on a free port, not started."""
    return EmbeddedPostgres(folder, ports.find_free())


def with_database(dsn: str, name: str) -> str:
    """Return the same URL for another database of the same server."""
    return urlsplit(dsn)._replace(path=f"/{name}").geturl()


async def execute(dsn: str, *statements: str) -> None:
    """Run statements that cannot be in a transaction, one after the other."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def delete_topics(bootstrap_servers: str, prefix: str) -> None:
    """Delete every topic whose name starts with the prefix."""
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        topics = [topic for topic in await admin.list_topics() if topic.startswith(prefix)]
        if topics:
            await admin.delete_topics(topics)
    finally:
        await admin.close()


def run_apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on an event loop in a thread of its own, whatever runs in this one."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _containers_wanted() -> bool:
    if os.environ.get("MILLRACE_TEST_CONTAINERS") != "1":
        return False
    import docker  # type: ignore[import-untyped]

    try:
        client = docker.from_env()
        try:
            return bool(client.ping())
        finally:
            client.close()
    except docker.errors.DockerException:
        return False
