"""Certificates and passwords replaced under load, and the former ones refused: nothing lost, nothing doubled.

The module has a broker of its own that asks for a client certificate and a password at once, and ends every
authenticated connection after seconds (KIP-368), so that a revoked credential is of no use from then on. The
processes are never restarted, but where a test kills one.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from millrace import ports
from millrace.kafka import EmbeddedKafka
from pipeline import broker
from pipeline.errors import DependencyError
from pipeline.settings import Settings, load
from tests.support import scram, services
from tests.support.certificates import Identity
from tests.support.eventually import eventually
from tests.support.mounts import MountedSecret
from tests.support.spine import STEPS, Installation, Spine, environment, installation, under_load

pytestmark = pytest.mark.timeout(240)

AUDIT = Path(__file__).parent.parent / "support" / "audit"
USER = "millrace"
SESSION_SECONDS = 3.0


@dataclass
class Secured:
    """A broker, who it is, what is mounted into the processes, and their database."""

    kafka: EmbeddedKafka
    folder: Path
    port: int
    server: Identity
    mounted: MountedSecret
    postgres: str
    role: str
    made: Installation

    def replace_identities(self) -> None:
        """Stop the broker; start it as another, which trusts nobody but a client that is new as well."""
        server, client = Identity(self.folder, "server-2"), Identity(self.folder, "client-2")
        server.trust(client)
        self.mounted.replace(certificates(server, client))
        self.kafka.stop()
        self.server.store.write_bytes(server.store.read_bytes())
        self.server.trusted.write_bytes(server.trusted.read_bytes())
        self.kafka.start()

    def set_password(self, password: str) -> None:
        """Change the password at the broker, not in the file."""
        scram.set_password(self.kafka, USER, password)

    def set_database_password(self, password: str) -> None:
        """Change the password at the database, not in the file, and end every connection made by the former."""
        services.run_apart(
            services.execute(
                self.postgres,
                f"ALTER ROLE {self.role} PASSWORD '{password}'",
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.role}'",
            )
        )

    def settings(self, client: str) -> Settings:
        """Return settings of a client by one of the certificates that were made."""
        return load(
            kafka_bootstrap_servers=f"127.0.0.1:{self.port}",
            kafka_security_protocol="SASL_SSL",
            kafka_sasl_username=USER,
            kafka_sasl_password_file=self.mounted / "password",
            kafka_tls_ca_file=self.mounted / "ca.crt",
            kafka_tls_certificate_file=self.folder / f"{client}.crt",
            kafka_tls_key_file=self.folder / f"{client}.key",
        )


def certificates(server: Identity, client: Identity) -> dict[str, str | bytes]:
    """Return the files of a client."""
    return {
        "ca.crt": server.authority.read_bytes(),
        "user.crt": client.certificate.read_bytes(),
        "user.key": client.key.read_bytes(),
    }


def start_broker(folder: Path, server: Identity) -> tuple[EmbeddedKafka, int]:
    """Start a broker with a listener that asks for certificate and password; return its port."""
    port, controller, secure = (ports.find_free() for _ in range(3))
    addresses = {"PLAINTEXT": port, "CONTROLLER": controller, "SECURE": secure}
    listeners = {name: f"{name}://127.0.0.1:{number}" for name, number in addresses.items()}
    of_listener = {
        "scram-sha-512.sasl.jaas.config": scram.JAAS,
        "scram-sha-512.connections.max.reauth.ms": str(int(SESSION_SECONDS * 1000)),
        "connections.max.reauth.ms": str(int(SESSION_SECONDS * 1000)),
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "ssl.client.auth": "required",
        **server.broker_properties(),
    }
    kafka = EmbeddedKafka(
        folder,
        port,
        controller,
        properties={
            "listeners": ",".join(listeners.values()),
            "advertised.listeners": ",".join(url for name, url in listeners.items() if name != "CONTROLLER"),
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL",
            **{f"listener.name.secure.{name}": value for name, value in of_listener.items()},
        },
    )
    kafka.start()
    return kafka, secure


def auditing(folder: Path) -> dict[str, str]:
    """Return the environment of processes that have a folder for what is temporary, and note where they write."""
    (folder / "tmp").mkdir()
    (folder / "home").mkdir()
    return {
        "PYTHONPATH": os.pathsep.join([str(AUDIT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TEST_WRITES_FILE": str(folder / "writes"),
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture(scope="module")
def secured(postgres: str, _template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Yield a broker of the module's own, a database with a user of its own, and what is mounted for both."""
    folder = tmp_path_factory.mktemp("rotation")
    server, client = Identity(folder, "server-1"), Identity(folder, "client-1")
    server.trust(client)
    kafka, port = start_broker(folder, server)
    role = name = f"rotation_{secrets.token_hex(6)}"
    services.run_apart(
        services.execute(
            postgres,
            f"CREATE ROLE {role} LOGIN PASSWORD 'first' SUPERUSER",
            f"CREATE DATABASE {name} TEMPLATE {_template}",
        )
    )
    try:
        scram.set_password(kafka, USER, "first")
        mounted = MountedSecret(
            folder / "mounted",
            certificates(server, client) | {"password": "first\n", "database-password": "first\n"},
        )
        # What sends, looks and counts comes by another door: only the processes may have to wait.
        database = services.with_database(postgres, name)
        with installation(
            environment(kafka.bootstrap_servers, database, folder / "objects", ""), folder
        ) as made:
            host = urlsplit(postgres).netloc.rpartition("@")[2]
            made.crew.environment |= {
                "MILLRACE_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{port}",
                "MILLRACE_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
                "MILLRACE_KAFKA_SASL_USERNAME": USER,
                "MILLRACE_KAFKA_SASL_PASSWORD_FILE": str(mounted / "password"),
                "MILLRACE_KAFKA_TLS_CA_FILE": str(mounted / "ca.crt"),
                "MILLRACE_KAFKA_TLS_CERTIFICATE_FILE": str(mounted / "user.crt"),
                "MILLRACE_KAFKA_TLS_KEY_FILE": str(mounted / "user.key"),
                "MILLRACE_DATABASE_URL": f"postgresql://{role}@{host}/{name}",
                "MILLRACE_DATABASE_PASSWORD_FILE": str(mounted / "database-password"),
                **auditing(folder),
            }
            yield Secured(kafka, folder, port, server, mounted, postgres, role, made)
    finally:
        kafka.stop()
        services.run_apart(
            services.execute(postgres, f"DROP DATABASE {name} WITH (FORCE)", f"DROP ROLE {role}")
        )


@pytest.fixture
async def spine(secured: Secured) -> AsyncIterator[Spine]:
    """Connect to the installation, with every step running."""
    async with secured.made.connect() as connected:
        await connected.start(*(step for step in STEPS if not connected.running(step)))
        yield connected


async def logged(spine: Spine, text: str, *steps: str) -> None:
    """Wait until each of these steps has said something since the test began."""
    before = {worker.log_path: len(worker.log()) for worker in spine.running(*steps)}

    async def said() -> bool:
        return all(text in worker.log()[before[worker.log_path] :] for worker in spine.running(*steps))

    await eventually(said, 60)


async def check_same(spine: Spine, pids: set[int]) -> None:
    """Check that the processes are those of before, and ready."""
    assert {worker.pid for worker in spine.running(*STEPS)} == pids
    for worker in spine.running(*STEPS):
        await asyncio.to_thread(worker.wait_ready)


async def test_certificates_are_replaced(spine: Spine, secured: Secured) -> None:
    """Authority, certificate and key are replaced under load, the former refused: nothing is lost or doubled."""
    pids = {worker.pid for worker in spine.crew.running}
    async with under_load(spine, "certificates", rate_per_second=30):
        await spine.wait_stored(20)
        # Half of a new pair: everybody keeps the former, on connections that end every few seconds.
        stranger = Identity(secured.folder, "stranger")
        halves = asyncio.create_task(logged(spine, "changed secret cannot be used", *STEPS))
        secured.mounted.replace({"user.crt": stranger.certificate.read_bytes()})
        await halves
        stored = len(spine.journal)
        await spine.wait_stored(stored)
        await asyncio.to_thread(secured.replace_identities)
        await spine.wait_stored(len(spine.journal))
    # What the broker's restart repeats: what was finished and not committed before it.
    await spine.settled(max_repeated=60)
    await check_same(spine, pids)
    await broker.ping(secured.settings("client-2"), 30.0)
    with pytest.raises(DependencyError):
        await broker.ping(secured.settings("client-1"), 5.0)


async def test_the_broker_changes_the_password_first(spine: Spine, secured: Secured) -> None:
    """A password revoked under load stops the steps until the new one is in the file, even one that starts then."""
    # `archive` is killed, for it starts soonest; and little is sent meanwhile: a backlog is not what is tested.
    async with under_load(spine, "broker-first", rate_per_second=10):
        await spine.wait_stored(10)
        refused = asyncio.create_task(logged(spine, "SaslAuthenticationFailed", "store", "archive"))
        await asyncio.to_thread(secured.set_password, "second")
        await refused
        (archive,) = spine.running("archive")
        archive.kill()
        pids = {worker.pid for worker in spine.running("predict", "store")}
        started = spine.crew.start("-m", "agents", "archive")
        await logged(spine, "waiting for the broker", "archive")
        secured.mounted.replace({"password": "second\n"})
        await asyncio.to_thread(started.wait_ready)
        await spine.wait_stored(len(spine.journal))
    await spine.settled(max_repeated=60)
    await check_same(spine, pids | {started.pid})


async def test_the_file_changes_the_password_first(spine: Spine, secured: Secured) -> None:
    """A password that the broker does not know yet is passed over for the former until it does."""
    pids = {worker.pid for worker in spine.crew.running}
    async with under_load(spine, "file-first", rate_per_second=30):
        await spine.wait_stored(20)
        passed_over = asyncio.create_task(logged(spine, "changed secret is refused", *STEPS))
        secured.mounted.replace({"password": "third\n"})
        await passed_over
        await spine.wait_stored(len(spine.journal))
        await asyncio.to_thread(secured.set_password, "third")
        await asyncio.sleep(SESSION_SECONDS)  # no connection of before is left
        await spine.wait_stored(len(spine.journal))
    await spine.settled(max_repeated=0)
    await check_same(spine, pids)


async def test_the_database_changes_the_password(spine: Spine, secured: Secured) -> None:
    """The database's password is changed under load, there first and in the file first, without a restart."""
    pids = {worker.pid for worker in spine.crew.running}
    async with under_load(spine, "database", rate_per_second=30):
        await spine.wait_stored(20)
        secured.mounted.replace({"database-password": ""})  # half-written
        refused = asyncio.create_task(logged(spine, "28P01", "store", "archive"))
        await asyncio.to_thread(secured.set_database_password, "second")
        await refused
        secured.mounted.replace({"database-password": "second\n"})
        await spine.wait_stored(len(spine.journal))
        secured.mounted.replace({"database-password": "third\n"})
        await spine.wait_stored(len(spine.journal))
        await asyncio.to_thread(secured.set_database_password, "third")
        await spine.wait_stored(len(spine.journal))
    await spine.settled(max_repeated=0)
    await check_same(spine, pids)


async def test_processes_write_where_a_pod_may(spine: Spine, secured: Secured) -> None:
    """Whatever else a step does, it writes nowhere but to the temporary folder and the object store."""
    await spine.send_many("writes", 10)
    await spine.settled()
    written = {Path(line) for line in (secured.folder / "writes").read_text().splitlines()}
    allowed = (secured.folder / "tmp", secured.folder / "objects", Path(os.devnull))
    assert any(path.is_relative_to(allowed[0]) for path in written)
    assert {path for path in written if not any(map(path.is_relative_to, allowed))} == set()
