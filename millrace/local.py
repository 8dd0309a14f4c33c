"""The services of the one-machine stack: the embedded Kafka and PostgreSQL, started together as settings ask.

Data lives in one folder: `kafka/`, `postgres/`, `objects/` and `logs/`. A service whose address is set
(`MILLRACE_KAFKA_BOOTSTRAP_SERVERS`, `MILLRACE_DATABASE_URL`) is somebody else's and is left alone.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from millrace.jars import Progress, kafka_classpath
from millrace.kafka import EmbeddedKafka
from millrace.postgres import EmbeddedPostgres
from pipeline.settings import Settings

__all__ = ["EmbeddedKafka", "EmbeddedPostgres", "LocalServices", "local_services"]


@dataclass(frozen=True)
class LocalServices:
    """What was started here; None where an address was set."""

    kafka: EmbeddedKafka | None
    postgres: EmbeddedPostgres | None


@contextmanager
def local_services(settings: Settings, on_progress: Progress | None = None) -> Iterator[LocalServices]:
    """Start the services that no address is set for, at the same time, and stop them on the way out.

    Blocks while they start (about 3 s, 5 s on an empty folder) and stop (under 1 s). The database stops last,
    as steps that still run may be writing what they read from Kafka.

    Raises:
        ConfigurationError: A port or the folder is taken.
        DependencyError: A service does not come up.
    """
    kafka = None
    if settings.kafka_bootstrap_servers is None:
        # Here rather than in the thread that starts Kafka, where Ctrl-C would not reach a long download.
        kafka_classpath(on_progress=on_progress)
        kafka = EmbeddedKafka(
            settings.data_dir,
            settings.kafka_port,
            settings.kafka_controller_port,
            settings.kafka_heap_megabytes,
        )
    postgres = None
    if settings.database_url is None:
        postgres = EmbeddedPostgres(settings.data_dir, settings.postgres_port)
    chosen = [service for service in (postgres, kafka) if service is not None]
    with ExitStack() as stack:
        for service in chosen:
            stack.callback(service.stop)
        with ThreadPoolExecutor() as pool:
            for starting in [pool.submit(service.start) for service in chosen]:
                starting.result()
        yield LocalServices(kafka, postgres)
