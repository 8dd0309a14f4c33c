"""`millrace models`: what runs where, another version, the history."""

import contextlib
import getpass
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from millrace.output import EXIT_FAILED, EXIT_USAGE, counted, emit, say, show, show_table
from pipeline import artefacts, registry
from pipeline.deployments import Desired, Running, check_models
from pipeline.errors import ConfigurationError
from pipeline.objects import ObjectStore
from pipeline.results import ModelVersion
from pipeline.settings import Settings

_DIGEST_CHARACTERS = 12


@dataclass(frozen=True)
class Wish:
    """What `models activate` was told."""

    deployment: str
    models: str
    note: str | None = None
    expected_revision: int | None = None
    wait_seconds: float = 0.0
    as_json: bool = False


async def show_list(settings: Settings, deployment: str | None, as_json: bool) -> int:
    """Print what each deployment should run and what its replicas run; 1 if one that is named is not known.

    Raises:
        DependencyError: no broker answers, or the topic is missing.
    """
    known = await registry.read(settings)
    found = [running for running in known if deployment in (None, running.name)]
    if as_json:
        for running in found:
            emit(running.view(datetime.now(UTC)))
    elif found:
        _show(found)
    unreadable = {name: reason for name, reason in known.unreadable.items() if deployment in (None, name)}
    for name, reason in unreadable.items():
        runs = "the version before it counts" if known[name].desired else "MILLRACE_MODELS counts"
        say(f"{name}: somebody wrote over its version: {reason}; {runs} until another is activated")
    if not found and not unreadable:
        say(
            f"nothing is known of {deployment}"
            if deployment
            else "no replica runs, and nothing was activated"
        )
    return EXIT_FAILED if deployment and not found else 0


async def activate(settings: Settings, wish: Wish) -> int:
    """Activate models and wait for the replicas; 0 only if each of them runs them.

    Raises:
        ConflictError: somebody else was first.
        DependencyError: the broker or the object store does not answer.
    """
    models = check_models(wish.models)
    objects = ObjectStore.open(settings)
    try:
        models, files = await artefacts.upload(objects, models)
    except ConfigurationError as error:
        say(f"millrace: {error.message}")
        return EXIT_USAGE
    finally:
        objects.close()
    async with registry.Follower(settings, client_id="millrace-cli") as follower:
        desired = await registry.activate(
            settings,
            wish.deployment,
            models,
            activated_by=_who(),
            artefacts=files,
            note=wish.note,
            expected_revision=wish.expected_revision,
        )
        revision = desired.version.revision
        if not wish.as_json:
            say(f"activated revision {revision} of {wish.deployment}")
        await follower.wait_until(lambda known: known[wish.deployment].revision >= revision, 10.0)
        if wish.wait_seconds:
            await follower.wait_until(
                lambda known: known[wish.deployment].is_settled(datetime.now(UTC)), wish.wait_seconds
            )
        running = follower.registry[wish.deployment]
    if wish.as_json:
        emit(running.view(datetime.now(UTC)))
    return _judge(running, revision, quiet=wish.as_json, waited=bool(wish.wait_seconds))


def _judge(running: Running, revision: int, *, quiet: bool, waited: bool) -> int:
    """Say what the replicas did with a revision; return the exit code."""
    if running.revision != revision:
        say(f"revision {running.revision} was activated after it: {_by(running.desired)}")
        return EXIT_FAILED
    if not waited:
        return 0
    states = running.states(datetime.now(UTC))
    of = {state: [name for name in states if states[name] == state] for state in set(states.values())}
    if not quiet:
        for name in of.get("refused", ()):
            refused = running.replicas[name].refused
            assert refused is not None
            on = running.replicas[name].revision
            say(f"{name} refused it and runs revision {on}: {refused.reason}")
        if not any(state in of for state in ("runs", "refused", "loads", "waits")):
            say("no replica runs: it counts from the start of one")
        elif "runs" in of:
            say(f"{counted(len(of['runs']), 'replica')} of {sum(map(len, of.values()))} run it")
        late = [*of.get("loads", ()), *of.get("waits", ())]
        if late:
            say(f"not heard of in time: {', '.join(late)}; see `millrace models list`")
    return EXIT_FAILED if any(state in of for state in ("refused", "loads", "waits")) else 0


async def history(settings: Settings, deployment: str, limit: int, as_json: bool) -> int:
    """Print the versions of a deployment, newest first; 1 if there are none.

    Raises:
        DependencyError, ConfigurationError: the database does not answer or refuses us.
    """
    from pipeline.database import Database

    database = await Database.open(settings)
    try:
        versions = await database.model_history(deployment, limit)
    finally:
        await database.close()
    if as_json:
        for version in versions:
            emit(version)
    elif versions:
        show_table(
            ("REVISION", "ACTIVATED", "BY", "MODELS", "CAME OF IT", "NOTE"),
            [
                (
                    str(version.revision),
                    _moment(version.activated_at),
                    version.activated_by,
                    ",".join(version.models),
                    _outcome(version),
                    version.note,
                )
                for version in versions
            ],
        )
    if not versions:
        say(f"the database has no version of {deployment}")
    return 0 if versions else EXIT_FAILED


def _show(found: Sequence[Running]) -> None:
    show_table(
        ("DEPLOYMENT", "REVISION", "MODELS", "ACTIVATED", "BY", "NOTE"),
        [
            (
                running.name,
                str(running.revision),
                ",".join(running.desired.version.models) if running.desired else "as MILLRACE_MODELS says",
                _moment(running.desired.activated_at) if running.desired else None,
                running.desired.activated_by if running.desired else None,
                running.desired.note if running.desired else None,
            )
            for running in found
        ],
    )
    rows = []
    for running in found:
        for name, state in running.states(datetime.now(UTC)).items():
            status = running.replicas[name]
            models = [
                f"{each.model} {each.version} {each.digest[:_DIGEST_CHARACTERS]}" for each in status.models
            ]
            rows.append(
                (
                    running.name,
                    name,
                    state,
                    None if status.revision is None else str(status.revision),
                    _moment(status.since) if status.since else None,
                    ", ".join(models),
                    status.refused.reason if status.refused and state == "refused" else None,
                )
            )
    if rows:
        show("")
        show_table(("DEPLOYMENT", "REPLICA", "STATE", "RUNS", "SINCE", "MODELS", "REASON"), rows)


def _outcome(version: ModelVersion) -> str:
    ran = {report.replica for report in version.reports if report.state == "runs"}
    refused = {report.replica: report.reason for report in version.reports if report.state == "refused"}
    parts = [f"{counted(len(ran), 'replica')} ran it"] if ran else []
    if refused:
        parts.append(f"{counted(len(refused), 'replica')} refused it: {next(iter(refused.values()))}")
    return "; ".join(parts) or "no replica tried it"


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _by(desired: Desired | None) -> str:
    return f"{','.join(desired.version.models)}, by {desired.activated_by}" if desired else "nothing"


def _who() -> str:
    name = "unknown"
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container may run as a user without a name
        name = getpass.getuser()
    return f"{name}@{socket.gethostname()}"[:500]
