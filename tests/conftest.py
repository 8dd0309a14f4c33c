"""Fixtures for every test: real services, a database and names of its own for each test."""

import contextlib
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.kafka import EmbeddedKafka
from millrace.postgres import EmbeddedPostgres
from tests.support import java, nvml, services
from tests.support.services import Share

_SHARES = pytest.StashKey[list[Share]]()

# The files that take longest, in this order. Workers are handed whole files: one of minutes that came last would
# leave the others with nothing to do. All else follows as it is drawn.
LONGEST = (
    "e2e/test_delivery_faults.py",
    "e2e/test_swap.py",
    "e2e/test_dependency_faults.py",
    "e2e/test_spine_faults.py",
    "e2e/test_poison.py",
    "integration/test_local.py",
    "e2e/test_rotation.py",
    "e2e/test_lost_ground.py",
    "e2e/test_watch.py",
    "e2e/test_measuring.py",
    "integration/test_hf_models.py",
    "e2e/test_storing.py",
    "e2e/test_one_machine.py",
)


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bootstrap servers of a broker that all tests share: name topics and groups with `topic_prefix`."""
    return _share(request.config, tmp_path_factory, "kafka").address()


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a server that all tests share, for creating databases; most tests want `database`."""
    return _share(request.config, tmp_path_factory, "postgres").address()


@pytest.fixture(scope="session")
def _template(postgres: str) -> Iterator[str]:
    """Name of a migrated database, made once per process, that others are cloned from."""
    from pipeline.database import migrate

    name = f"template_{secrets.token_hex(6)}"
    services.run_apart(services.execute(postgres, f"CREATE DATABASE {name}"))
    services.run_apart(migrate(services.with_database(postgres, name)))
    yield name
    services.run_apart(services.execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def database(postgres: str, _template: str) -> Iterator[str]:
    """URL of a fresh, migrated database of the test's own."""
    name = f"test_{secrets.token_hex(6)}"
    services.run_apart(services.execute(postgres, f"CREATE DATABASE {name} TEMPLATE {_template}"))
    yield services.with_database(postgres, name)
    services.run_apart(services.execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def topic_prefix(request: pytest.FixtureRequest) -> Iterator[str]:
    """Prefix for the topics and groups of one test; its topics are deleted afterwards."""
    prefix = f"t{secrets.token_hex(4)}-"
    yield prefix
    if "kafka" in request.fixturenames:
        # Hundreds of left-over partitions slow the shared broker down; failing to tidy up fails no test.
        with contextlib.suppress(Exception):
            services.run_apart(services.delete_topics(request.getfixturevalue("kafka"), prefix))


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """Yield a started broker of the test's own, to kill and start again on the same data and port."""
    broker = services.embedded_kafka(tmp_path)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """Yield a started server of the test's own, to kill and start again on the same data and port."""
    server = services.embedded_postgres(tmp_path)
    server.start()
    yield server
    server.stop()


def _share(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory, name: str) -> Share:
    folder = _services_folder(config, tmp_path_factory)
    share = Share(folder, name, services.start_kafka if name == "kafka" else services.start_postgres)
    config.stash.setdefault(_SHARES, []).append(share)
    return share


def _services_folder(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Under xdist every worker's folder lies in one of the run's, which is the place they have in common.
    in_worker = hasattr(config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    return (base.parent if in_worker else base) / "services"


@pytest.fixture(scope="session", autouse=True)
def _java_classes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let every broker of this run start with the classes that the shared one has archived, once it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*java.use_classes(_services_folder(request.config, tmp_path_factory)))
        yield


def pytest_configure() -> None:
    """Let children get SIGINT, which some tests send: what a shell runs in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # after pytest-randomly has drawn an order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files start first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places), "LONGEST names a file that is not there"
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the shared services, here rather than in fixtures: waiting for other workers is no test's time."""
    services.close(session.config.stash.get(_SHARES, []))


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a libnvidia-ml.so.1 that says what a `tests.support.nvml.Script` tells it to."""
    return nvml.build(tmp_path_factory.mktemp("nvml"))
