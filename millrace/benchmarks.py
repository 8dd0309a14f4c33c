"""`millrace bench` and `millrace soak`: a stack of their own on free ports, measured by `loadtest`.

Data lives in a temporary folder that is deleted; a stack that runs elsewhere on the machine is not touched.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loadtest import (
    bench,
    engine,
    engine_load,
    engine_results,
    report,
    results,
    search,
    soak,
    steps_bench,
    telemetry_bench,
)
from loadtest.autoscale import bench as autoscale
from loadtest.autoscale import plots
from loadtest.autoscale.policies import Facts
from millrace import ports, processes
from millrace.local import local_services
from millrace.output import EXIT_FAILED, emit, say, show_table
from pipeline import broker
from pipeline.database import migrate
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.settings import PREFIX, Settings

KEPT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
_AUTOSCALING_PAGE = KEPT.parent / "autoscaling.md"
_READY_SECONDS = 120.0
_NO_DATABASE = "postgresql://127.0.0.1:1/none"


@dataclass(frozen=True)
class Stack:
    """What runs: its settings, the address of each part's HTTP site, and the processes of parts and services."""

    settings: Settings
    urls: dict[str, str]
    pids: dict[str, int]


def run_bench(settings: Settings, plan: results.Plan, *, as_json: bool, write: bool) -> int:
    """Measure the spine with one `predict` worker; return the exit code."""
    load_before, others = os.getloadavg()[0], report.Others()
    _check_folder(write)
    with running(settings, ("predict",)) as stack:
        measuring = bench.Bench(stack.settings, plan, pids=_pids(stack), say=say)
        result = asyncio.run(measuring.run(load_before))
    result = msgspec.structs.replace(result, others_busy_cores=others.busy_cores())
    _give(result, results.rows(result), as_json, KEPT / "spine.json" if write else None)
    return EXIT_FAILED if result.online.lost else 0


def run_engine(settings: Settings, plan: engine_results.Plan, *, as_json: bool, write: bool) -> int:
    """Measure the engine with one `predict` worker for each model; return the exit code.

    The file keeps what is not measured.
    """
    circumstances, others = report.Circumstances.now(os.getloadavg()[0]), report.Others()
    _check_folder(write)
    result = engine_results.Result(
        commit=circumstances.commit,
        machine=circumstances.machine,
        seed=plan.seed,
        circumstances=circumstances,
        plan=plan,
        models={},
    )
    for model in plan.models if "speed" in plan.parts else plan.models[:1]:
        with _predicting(settings, model) as stack:
            url = stack.urls["predict"]
            if "speed" in plan.parts:
                measuring = engine.EngineBench(stack.settings, plan, url, pids=_pids(stack), say=say)
                result.models[model] = asyncio.run(measuring.run(model))
            if model == plan.models[0]:
                loading = engine_load.LoadBench(stack.settings, plan, url, say=say)
                result = asyncio.run(loading.run(result))
    result = msgspec.structs.replace(result, others_busy_cores=others.busy_cores())
    rows, kept = engine_results.rows(result), KEPT / "engine.json"
    if write and kept.exists():
        before = msgspec.json.decode(kept.read_bytes(), type=engine_results.Result)
        result = engine_results.merged(before, result)
    _give(result, rows, as_json, kept if write else None)
    return 0


def _predicting(settings: Settings, model: str) -> AbstractContextManager[Stack]:
    return running(settings.model_copy(update={"models": engine.specification(model)}), ("predict",))


def _pids(stack: Stack) -> dict[str, int]:
    """Return the processes whose processor time is told apart, by what a result calls them."""
    names = {"predict": "worker", "kafka": "broker"}
    return {names[part]: pid for part, pid in stack.pids.items() if part in names}


def run_search(settings: Settings, plan: search.Plan, *, as_json: bool, write: bool) -> int:
    """Measure search in a database of its own; return the exit code."""
    circumstances, others = report.Circumstances.now(os.getloadavg()[0]), report.Others()
    _check_folder(write)
    with running(settings, ()) as stack:
        result = asyncio.run(search.SearchBench(stack.settings, plan, say=say).run(circumstances))
    result = msgspec.structs.replace(result, others_busy_cores=others.busy_cores())
    _give(result, search.rows(result), as_json, KEPT / "search.json" if write else None)
    return 0


def run_telemetry(
    settings: Settings, plan: telemetry_bench.Plan, sections: Sequence[str], *, as_json: bool, write: bool
) -> int:
    """Measure sections of GPU telemetry; the file keeps what is not measured. Return the exit code."""
    if unknown := sorted(set(sections) - set(telemetry_bench.SECTIONS)):
        raise ConfigurationError(
            f"there is no section {', '.join(unknown)}; there are {', '.join(telemetry_bench.SECTIONS)}"
        )
    circumstances, others = report.Circumstances.now(os.getloadavg()[0]), report.Others()
    _check_folder(write)
    measured: dict[str, Any] = {}
    with running(settings, ()) as stack:
        for name in sections or telemetry_bench.SECTIONS:
            say(f"measuring {name}")
            measured[name] = telemetry_bench.SECTIONS[name](stack.settings, plan, _worker, say)
    result = {
        "commit": circumstances.commit,
        "machine": circumstances.machine,
        "seed": plan.seed,
        "circumstances": circumstances,
        "plan": plan,
        "others_busy_cores": others.busy_cores(),
        **measured,
    }
    kept = KEPT / "telemetry.json"
    if write and kept.exists():
        result = msgspec.json.decode(kept.read_bytes()) | result
    _give(result, telemetry_bench.rows(measured), as_json, kept if write else None)
    return 0


@contextmanager
def _worker(settings: Settings, step: str) -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="millrace-") as name,
        _processes(settings, (step,), Path(name)) as stack,
    ):
        yield stack.urls[step]


def run_autoscale(plan: autoscale.Plan, folder: Path | None, *, as_json: bool, write: bool) -> int:
    """Simulate autoscaling, without any stack; exit 1 if the deadline policy misses what it promises."""
    circumstances = report.Circumstances.now(os.getloadavg()[0])
    _check_folder(write)
    result = autoscale.measure(plan, circumstances, say)
    facts = Facts(plan.pod_images_per_second, plan.start_seconds, plan.deadline_seconds)
    if folder is not None:
        for path in plots.draw_all(folder, facts, plan.seed):
            say(f"drawn in {path}")
    if write:
        report.keep(result, KEPT / "autoscaling.json")
        say(f"kept in {KEPT / 'autoscaling.json'}")
        plots.write_page(_AUTOSCALING_PAGE, facts, plan.seed)
        say(f"drawn in {_AUTOSCALING_PAGE}")
    if as_json:
        emit(result)
    else:
        show_table(autoscale.COLUMNS, autoscale.rows(result))
    return 0 if result.reached else EXIT_FAILED


def run_steps(settings: Settings, plan: steps_bench.Plan, *, as_json: bool, write: bool) -> int:
    """Measure `store` and `archive`; return the exit code."""
    circumstances, others = report.Circumstances.now(os.getloadavg()[0]), report.Others()
    _check_folder(write)
    with running(settings, ()) as stack:
        result = steps_bench.measure(stack.settings, plan, _worker, circumstances, say)
    result = msgspec.structs.replace(result, others_busy_cores=others.busy_cores())
    _give(result, steps_bench.rows(result), as_json, KEPT / "steps.json" if write else None)
    return 0


def run_soak(settings: Settings, plan: soak.Plan, *, as_json: bool, write: bool) -> int:
    """Load everything for minutes; return the exit code."""
    load_before, others = os.getloadavg()[0], report.Others()
    _check_folder(write)
    with running(settings, ("gateway", "predict", "store", "archive")) as stack:
        soaking = soak.Soak(stack.settings, plan, stack.urls, say=say)
        result = asyncio.run(soaking.run(load_before))
    result = msgspec.structs.replace(result, others_busy_cores=others.busy_cores())
    _give(result, soak.rows(result), as_json, KEPT / "soak.json" if write else None)
    return EXIT_FAILED if result.faults else 0


@contextmanager
def running(settings: Settings, parts: Sequence[str]) -> Iterator[Stack]:
    """Run Kafka, PostgreSQL for the parts that need it, and one process of each part."""
    has_database = set(parts) != {"predict"}
    with tempfile.TemporaryDirectory(prefix="millrace-") as name:
        folder = Path(name)
        own = settings.model_copy(
            update={
                "data_dir": folder,
                "kafka_bootstrap_servers": None,
                "kafka_port": ports.find_free(),
                "kafka_controller_port": ports.find_free(),
                "postgres_port": ports.find_free(),
                "database_url": None if has_database else _NO_DATABASE,
                "object_store_url": str(folder / "objects"),
            }
        )
        say("starting Kafka" + (" and PostgreSQL" if has_database else ""))
        with local_services(own) as services:
            own = own.model_copy(update={"kafka_bootstrap_servers": own.resolved_kafka})
            if services.postgres is not None:
                own = own.model_copy(update={"database_url": services.postgres.dsn})
            asyncio.run(_prepare(own, has_database))
            with _processes(own, parts, folder) as stack:
                if services.kafka is not None and services.kafka.pid is not None:
                    stack.pids["kafka"] = services.kafka.pid
                yield stack


async def _prepare(settings: Settings, has_database: bool) -> None:
    await broker.apply_topics(settings)
    if has_database:
        await migrate(settings.resolved_database, settings.database_password_file)


@contextmanager
def _processes(settings: Settings, parts: Sequence[str], folder: Path) -> Iterator[Stack]:
    """Start the parts, wait until they are ready, and drain them at the end."""
    environment = {
        **os.environ,
        f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": settings.resolved_kafka,
        f"{PREFIX}DATABASE_URL": settings.resolved_database,
        f"{PREFIX}OBJECT_STORE_URL": settings.resolved_object_store,
        f"{PREFIX}DATA_DIR": str(folder),
        f"{PREFIX}TOPIC_PREFIX": settings.topic_prefix,
        f"{PREFIX}MODELS": settings.models,
        f"{PREFIX}WORKER_HOST": "127.0.0.1",
        f"{PREFIX}GATEWAY_HOST": "127.0.0.1",
    }
    started: dict[str, subprocess.Popen[bytes]] = {}
    urls = {}
    if parts:
        say(f"starting {', '.join(parts)}")
    try:
        for part in parts:
            port = ports.find_free()
            urls[part] = f"http://127.0.0.1:{port}"
            is_gateway = part == "gateway"
            started[part] = processes.spawn(
                [sys.executable, "-m", *(["gateway"] if is_gateway else ["agents", part])],
                log_path=folder / f"{part}.log",
                env=environment | {f"{PREFIX}{'GATEWAY' if is_gateway else 'WORKER'}_PORT": str(port)},
            )
        for part, process in started.items():
            if (
                not processes.wait_until(_is_up(process, urls[part]), _READY_SECONDS)
                or process.poll() is not None
            ):
                raise DependencyError(f"{part} is not ready:\n{processes.tail(folder / f'{part}.log')}")
        yield Stack(settings, urls, {part: process.pid for part, process in started.items()})
    finally:
        for process in started.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in started.values():
            processes.stop(process, signal.SIGTERM, settings.shutdown_grace_seconds + 5.0)


def _is_up(process: subprocess.Popen[bytes], url: str) -> Callable[[], bool]:
    """Make a check that holds when a process is ready, and when it has ended."""

    def check() -> bool:
        if process.poll() is not None:
            return True
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return check


def _check_folder(write: bool) -> None:
    if write and not KEPT.parent.is_dir():
        raise ConfigurationError("--write keeps results in docs/benchmarks of a checkout, and this is none")


def _give(result: Any, rows: list[tuple[str, str]], as_json: bool, path: Path | None) -> None:
    if path is not None:
        report.keep(result, path)
        say(f"kept in {path}")
    if as_json:
        emit(result)
    else:
        show_table(("what", "result"), rows)
