"""The spine for end-to-end tests: an installation of the test's own, or one that a module's tests share."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import services
from tests.support.spine import STEPS, Installation, Spine, environment, installation
from tests.support.workers import Workers


@pytest.fixture
def own_installation(kafka: str, database: str, topic_prefix: str, tmp_path: Path) -> Iterator[Installation]:
    """Topics and a database of the test's own on the shared services; it starts its processes itself."""
    with installation(environment(kafka, database, tmp_path / "objects", topic_prefix), tmp_path) as made:
        yield made


@pytest.fixture
async def spine(own_installation: Installation) -> AsyncIterator[Spine]:
    """Connect to the test's own installation."""
    async with own_installation.connect() as connected:
        yield connected


@pytest.fixture(scope="module")
def shared_installation(
    request: pytest.FixtureRequest,
    kafka: str,
    postgres: str,
    _template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    """Topics and a database for all tests of a module, which must not disturb each other.

    The module's `ENVIRONMENT` adds settings, its `STEPS` are started once.
    """
    prefix, folder = f"m{secrets.token_hex(4)}-", tmp_path_factory.mktemp("shared")
    name = f"test_{secrets.token_hex(6)}"
    services.run_apart(services.execute(postgres, f"CREATE DATABASE {name} TEMPLATE {_template}"))
    more: dict[str, str] = getattr(request.module, "ENVIRONMENT", {})
    settings = environment(kafka, services.with_database(postgres, name), folder / "objects", prefix, **more)
    try:
        with installation(settings, folder) as made:
            started = [made.crew.start("-m", "agents", step) for step in request.module.STEPS]
            for worker in started:
                worker.wait_ready()
            yield made
    finally:
        services.run_apart(services.execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))
        services.run_apart(services.delete_topics(kafka, prefix))


@pytest.fixture
async def shared_spine(
    request: pytest.FixtureRequest, shared_installation: Installation
) -> AsyncIterator[Spine]:
    """Connect to the module's installation, with a journal of the test's own; stop what the test started."""
    async with shared_installation.connect() as connected:
        yield connected
        own = connected.running(*(set(STEPS) - set(request.module.STEPS)))
        # In good order: a member that vanishes would keep the next test waiting for the session timeout.
        await asyncio.gather(*(asyncio.to_thread(worker.terminate) for worker in own))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the workers' logs with a test that failed."""
    report = yield
    if report.failed:
        given = getattr(item, "funcargs", {}).values()
        crews = {
            id(crew): crew for value in given if isinstance(crew := getattr(value, "crew", value), Workers)
        }
        report.sections += [("workers", crew.logs()) for crew in crews.values()]
    return report
