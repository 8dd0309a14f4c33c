"""TLS, SASL/SCRAM and client certificates against a real broker; files that are rotated under a running client."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadtest import faults
from loadtest.drive import Driver
from millrace import ports
from millrace.kafka import EmbeddedKafka
from pipeline import broker
from pipeline.broker import LiveReader, Publisher
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.events import ImageEvent, Outgoing
from pipeline.settings import PREFIX, Settings, load
from pipeline.topics import IMAGES_BULK
from tests.support import scram
from tests.support.certificates import Identity
from tests.support.eventually import eventually
from tests.support.workers import workers

# Made once: a broker with three listeners, and a JVM for each change of a password.
pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("secure broker")]


@dataclass
class Secure:
    """A broker that is reached by password over TLS on one port, by client certificate on another."""

    kafka: EmbeddedKafka
    folder: Path
    sasl_port: int
    mutual_port: int
    server: Identity
    client: Identity
    stranger: Identity

    def by_password(self, password: str = "first", name: str = "password", **changes: Any) -> Settings:
        """Write the password to a file and return settings that name it."""
        file = self.folder / name
        file.write_text(password + "\n")
        values = {
            "kafka_bootstrap_servers": f"127.0.0.1:{self.sasl_port}",
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_username": "alice",
            "kafka_sasl_password_file": file,
            "kafka_tls_ca_file": self.server.authority,
        }
        return load(**values | changes)

    def by_certificate(self, **changes: Any) -> Settings:
        """Return settings with the client's certificate."""
        values = {
            "kafka_bootstrap_servers": f"127.0.0.1:{self.mutual_port}",
            "kafka_security_protocol": "SSL",
            "kafka_tls_ca_file": self.server.authority,
            "kafka_tls_certificate_file": self.client.certificate,
            "kafka_tls_key_file": self.client.key,
        }
        return load(**values | changes)

    def set_password(self, password: str) -> None:
        """Give the user a password, as an administrator does."""
        scram.set_password(self.kafka, "alice", password)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("secure")
    server, client, stranger = (Identity(folder, name) for name in ("server", "client", "stranger"))
    server.trust(client)
    port, controller, sasl, mutual = (ports.find_free() for _ in range(4))
    addresses = {"PLAINTEXT": port, "CONTROLLER": controller, "SASL": sasl, "MUTUAL": mutual}
    listeners = {name: f"{name}://127.0.0.1:{number}" for name, number in addresses.items()}
    kafka = EmbeddedKafka(
        folder / "data",
        port,
        controller,
        properties={
            "listeners": ",".join(listeners.values()),
            "advertised.listeners": ",".join(url for name, url in listeners.items() if name != "CONTROLLER"),
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_SSL,MUTUAL:SSL",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl.scram-sha-512.sasl.jaas.config": scram.JAAS,
            "listener.name.mutual.ssl.client.auth": "required",
            **server.broker_properties(),
        },
    )
    kafka.start()
    made = Secure(kafka, folder, sasl, mutual, server, client, stranger)
    made.set_password("first")
    yield made
    kafka.stop()


@pytest.fixture(autouse=True)
async def _closed_connections() -> AsyncIterator[None]:
    """Give aiokafka's refused connections the moment that closing TLS takes; it does not wait for them."""
    yield
    await asyncio.sleep(0.2)


async def check_every_client(settings: Settings) -> None:
    """Publish, read, administer and ask for lag with the same settings."""
    await broker.apply_topics(settings, [IMAGES_BULK])
    reader = LiveReader(settings, [IMAGES_BULK.name])
    await reader.start(wait=False)
    publisher = Publisher(settings, client_id="test")
    await publisher.start(wait=False)
    place = await publisher.publish(IMAGES_BULK.name, Outgoing(b"k", b"secret", ()))
    async with asyncio.timeout(10):
        async for record in reader:
            assert record.value == b"secret"
            break
    await publisher.stop()
    await reader.stop()
    assert await broker.read_back(settings, place.topic, place.partition, place.offset)
    assert sum(row.lag for row in await broker.lag(settings, ["archive"])) > 0


async def test_a_password_over_tls_reaches_the_broker(secure: Secure) -> None:
    """With SASL/SCRAM over TLS every client works; the password comes from a file."""
    await check_every_client(secure.by_password())


async def test_a_client_certificate_reaches_the_broker(secure: Secure) -> None:
    """With a client certificate every client works."""
    await check_every_client(secure.by_certificate())


@pytest.mark.parametrize("how", ["by_password", "by_certificate"])
async def test_a_worker_reads_and_writes_over_tls(how: str, secure: Secure, tmp_path: Path) -> None:
    """A step joins its group, reads and publishes with a password over TLS, and with a client certificate."""
    settings: Settings = getattr(secure, how)(topic_prefix=f"{how}-", topic_partitions=2)
    environment = {
        PREFIX + name.upper(): str(value)
        for name, value in settings.model_dump(exclude_unset=True).items()
        if value is not None
    }
    await broker.apply_topics(settings)
    with workers(environment, tmp_path) as crew:
        await asyncio.to_thread(crew.start("-m", "tests.support.steps").wait_ready)
        async with Driver(
            settings, lambda n: ImageEvent(id=f"id-{n}", data=b"x"), rate_per_second=50
        ) as driver:
            await asyncio.sleep(1)
        journal = driver.journal

        async def all_predicted() -> bool:
            return (await faults.account_topics(settings, journal)).is_clean

        await eventually(all_predicted, 30)
    assert len(journal)


async def test_wrong_credentials_are_told_in_time(secure: Secure) -> None:
    """A wrong password, a certificate nobody trusts and an unknown authority end with an error, not a hang."""
    wrong = [
        secure.by_password("wrong", "wrong-password"),
        secure.by_password(kafka_tls_ca_file=secure.stranger.authority),
        secure.by_certificate(
            kafka_tls_certificate_file=secure.stranger.certificate, kafka_tls_key_file=secure.stranger.key
        ),
        secure.by_certificate(kafka_tls_certificate_file=None, kafka_tls_key_file=None),
    ]
    for settings in wrong:
        async with asyncio.timeout(15):
            with pytest.raises(DependencyError, match="no Kafka broker answers"):
                await broker.ping(settings, 5.0)


async def test_files_that_are_no_certificates_name_their_settings(secure: Secure) -> None:
    """A file that cannot be used is a configuration error that names the variables."""
    broken = secure.folder / "broken.crt"
    broken.write_text("no certificate")
    with pytest.raises(ConfigurationError, match="MILLRACE_KAFKA_TLS_CA_FILE"):
        await broker.ping(secure.by_certificate(kafka_tls_ca_file=broken), 5.0)
    mixed = secure.by_certificate(kafka_tls_key_file=secure.stranger.key)
    with pytest.raises(ConfigurationError, match="MILLRACE_KAFKA_TLS_KEY_FILE"):
        await Publisher(mixed, client_id="test").start(wait=False)


async def test_a_rotated_certificate_is_read_again(secure: Secure) -> None:
    """A running client presents the certificate that is on disk when it connects, not the one it started with."""
    certificate, key = secure.folder / "mine.crt", secure.folder / "mine.key"
    certificate.write_bytes(secure.stranger.certificate.read_bytes())
    key.write_bytes(secure.stranger.key.read_bytes())
    settings = secure.by_certificate(kafka_tls_certificate_file=certificate, kafka_tls_key_file=key)
    options = broker.client_options(settings)
    with pytest.raises(DependencyError):
        await _bootstrap(settings, options)
    certificate.write_bytes(secure.client.certificate.read_bytes())
    key.write_bytes(secure.client.key.read_bytes())
    await _bootstrap(settings, options)


async def _bootstrap(settings: Settings, options: dict[str, Any]) -> None:
    """Connect with options that were made before."""
    from aiokafka.client import AIOKafkaClient
    from aiokafka.errors import KafkaError

    client = AIOKafkaClient(**options, request_timeout_ms=5000)
    try:
        await client.bootstrap()
    except KafkaError as error:
        raise DependencyError(repr(error)) from None
    finally:
        await client.close()
