"""What runs where: the contract of `models.v1`, and the state that its records add up to.

A deployment's *desired* version is keyed by its name, what a replica runs by `<deployment>/<replica>`. The
latest record of a key counts, whatever its number: it is the one that compaction leaves, so a replica that
starts and one that has read along agree. Garbage is an error to the caller and changes no state; over a desired
version it is kept in mind, because compaction will leave nothing else. No I/O.
"""

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import msgspec

from pipeline.errors import ConfigurationError, ContractError
from pipeline.events import Outgoing, Record

DESIRED_TYPE = "millrace.models.desired.v1"
STATUS_TYPE = "millrace.models.status.v1"

# A replica reports at least this often; one that was not heard of for three times as long, and a bit for the
# clocks of two machines, is not counted any more.
REPORT_SECONDS = 10.0
SILENT_SECONDS = 3 * REPORT_SECONDS + 5.0

#: What may come before the first colon of a specification.
SOURCES = ("builtin", "torchvision", "timm", "hf", "file", "python")

_TEXT = r"^[^\x00-\x1f\x7f]*$"
_DEPLOYMENT = r"^[a-z0-9][a-z0-9-]{0,62}$"
Deployment = Annotated[str, msgspec.Meta(pattern=_DEPLOYMENT)]
ReplicaName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Specification = Annotated[str, msgspec.Meta(pattern=_TEXT, min_length=1, max_length=1000)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, msgspec.Meta(pattern=_TEXT, max_length=500)]
Revision = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]

ReplicaState = Literal["runs", "loads", "refused", "waits", "silent"]


class Artefact(msgspec.Struct, frozen=True):
    """A file of a model, kept in the object store as `models/<sha256>/<name>`."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
    sha256: Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]


class Version(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A version of a deployment's models; revision 0 is what `MILLRACE_MODELS` says."""

    revision: Revision
    #: Specifications, as in `MILLRACE_MODELS`, in the order of the results.
    models: Annotated[tuple[Specification, ...], msgspec.Meta(min_length=1, max_length=100)]
    #: What `file:` specifications name, beside one another in one folder.
    artefacts: Annotated[tuple[Artefact, ...], msgspec.Meta(max_length=100)] = ()


class Desired(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The version a deployment should run: value of `models.v1` under the deployment's name."""

    deployment: Deployment
    version: Version
    activated_by: Line
    activated_at: Moment
    #: For a replica that cannot load the version: the latest one before it that is not known to fail.
    predecessor: Version | None = None
    note: Line | None = None


class ModelIdentity(msgspec.Struct, frozen=True):
    """A model as a replica has loaded it."""

    model: str
    version: str
    digest: str
    task: str


class Refusal(msgspec.Struct, frozen=True):
    """A revision that a replica cannot run, and why."""

    revision: Revision
    reason: str
    time: Moment


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one replica runs: value of `models.v1` under `<deployment>/<replica>`."""

    deployment: Deployment
    replica: ReplicaName
    #: Of this report.
    time: Moment
    #: What it runs; None while it starts.
    revision: Revision | None = None
    since: Moment | None = None
    models: tuple[ModelIdentity, ...] = ()
    #: What it is loading, beside what it runs.
    loading: Revision | None = None
    #: How often in a row it has begun to load that revision; more than once if it died over it.
    attempts: int = 0
    refused: Refusal | None = None


_encoder = msgspec.json.Encoder()
_desired_decoder = msgspec.json.Decoder(Desired)
_status_decoder = msgspec.json.Decoder(Status)


def key_of(value: Desired | Status) -> str:
    """Return the record key."""
    return value.deployment if isinstance(value, Desired) else f"{value.deployment}/{value.replica}"


def encode(value: Desired | Status) -> Outgoing:
    """Encode for `models.v1`, in CloudEvents binary mode.

    Raises:
        ContractError: a part of it is longer than the contract allows, or has characters that it refuses.
    """
    key = key_of(value)
    is_desired = isinstance(value, Desired)
    moment = value.activated_at if isinstance(value, Desired) else value.time
    number = value.version.revision if isinstance(value, Desired) else int(moment.timestamp() * 1000)
    headers = {
        "ce_specversion": "1.0",
        "ce_type": DESIRED_TYPE if is_desired else STATUS_TYPE,
        "ce_id": f"{key}/{number}",
        "ce_source": f"millrace/models/{key}",
        "ce_time": moment.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "content-type": "application/json",
    }
    encoded = _encoder.encode(value)
    _decode_value(_desired_decoder if is_desired else _status_decoder, encoded)
    return Outgoing(key.encode(), encoded, tuple((name, text.encode()) for name, text in headers.items()))


def tombstone(key: str) -> Outgoing:
    """Return the record that takes a key off the topic."""
    return Outgoing(key.encode(), None, ())


def decode(record: Record) -> Desired | Status | None:
    """Read a record; None is a tombstone.

    Raises:
        ContractError: it is none of ours, or of a version that this does not read.
    """
    key = (record.key or b"").decode("utf-8", "replace")
    if not key:
        raise ContractError("the record has no key")
    if not record.value:
        return None
    is_desired = "/" not in key
    expected = DESIRED_TYPE if is_desired else STATUS_TYPE
    given = (record.header("ce_type") or expected.encode()).decode("utf-8", "replace")
    if given != expected:
        raise ContractError(f"ce_type under the key {key[:200]!r} is {given[:80]!r}, this reads {expected}")
    value: Desired | Status = _decode_value(_desired_decoder if is_desired else _status_decoder, record.value)
    if key != key_of(value):
        raise ContractError(f"the key {key[:200]!r} is not that of its value, {key_of(value)!r}")
    return value


def _decode_value(decoder: msgspec.json.Decoder[Desired] | msgspec.json.Decoder[Status], value: bytes):  # type: ignore[no-untyped-def]
    try:
        return decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"not a record of models.v1: {error}") from error


def replica_name(part: str) -> str:
    """Return a name for a part of this machine; in a pod it outlives a container, process id included."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.")[:64] or "host"
    return f"{host}-{part}"


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """A replica, and how it stands to the desired version."""

    state: ReplicaState
    status: Status


class DeploymentView(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment: what it should run, and what its replicas run."""

    deployment: str
    #: The desired one; 0: none was activated, `MILLRACE_MODELS` counts.
    revision: int
    #: Whether every replica that is heard of runs it or has refused it.
    is_settled: bool
    desired: Desired | None
    replicas: tuple[ReplicaView, ...]


def check_models(text: str) -> list[str]:
    """Return the specifications in a comma-separated text; whether they load is each replica's affair.

    Raises:
        ConfigurationError: there is none, or one is not `SOURCE:NAME`.
    """
    models = [name.strip() for name in text.split(",") if name.strip()]
    if not models:
        raise ConfigurationError("no model is named")
    for name in models:
        source, _, rest = name.partition(":")
        if source not in SOURCES or not rest:
            raise ConfigurationError(f"{name!r} is not SOURCE:NAME with a source of {', '.join(SOURCES)}")
    return models


@dataclass
class Running:
    """One deployment: what it should run, and what its replicas say."""

    name: str
    desired: Desired | None = None
    replicas: dict[str, Status] = field(default_factory=dict)

    @property
    def revision(self) -> int:
        """The desired revision; 0 is what `MILLRACE_MODELS` says."""
        return self.desired.version.revision if self.desired else 0

    @property
    def next_revision(self) -> int:
        """A number above every one that is known, in case somebody wrote over the desired version."""
        known = [self.revision]
        for status in self.replicas.values():
            known += [status.revision or 0, status.refused.revision if status.refused else 0]
        return max(known) + 1

    def state(self, status: Status, now: datetime) -> ReplicaState:
        """Say how a replica stands to the desired version."""
        if now - status.time > timedelta(seconds=SILENT_SECONDS):
            return "silent"
        if status.loading == self.revision:
            return "loads"
        if status.revision == self.revision:
            return "runs"
        if status.refused is not None and status.refused.revision == self.revision:
            return "refused"
        return "waits"

    def states(self, now: datetime) -> dict[str, ReplicaState]:
        """Return each replica's state by name."""
        return {name: self.state(self.replicas[name], now) for name in sorted(self.replicas)}

    def view(self, now: datetime) -> "DeploymentView":
        """Return what command line and HTTP show of it."""
        return DeploymentView(
            deployment=self.name,
            revision=self.revision,
            is_settled=self.is_settled(now),
            desired=self.desired,
            replicas=tuple(
                ReplicaView(state=state, status=self.replicas[name])
                for name, state in self.states(now).items()
            ),
        )

    def is_settled(self, now: datetime) -> bool:
        """Whether every replica that is heard of runs the desired version or has refused it."""
        return all(state not in ("loads", "waits") for state in self.states(now).values())

    def good_version(self) -> Version | None:
        """Return what a next version should name as its predecessor.

        The desired one, unless replicas have refused it and none runs it; then its own predecessor.
        """
        if self.desired is None:
            return None
        statuses = self.replicas.values()
        is_refused = any(status.refused and status.refused.revision == self.revision for status in statuses)
        if is_refused and not any(status.revision == self.revision for status in statuses):
            return self.desired.predecessor
        return self.desired.version


class Registry:
    """The state of `models.v1`, record by record in their order."""

    def __init__(self) -> None:
        self._deployments: dict[str, Running] = {}
        #: Deployments over whose desired version something was written that cannot be read, and why it cannot.
        self.unreadable: dict[str, str] = {}

    def __iter__(self) -> Iterator[Running]:
        return iter(sorted(self._deployments.values(), key=lambda running: running.name))

    def __getitem__(self, name: str) -> Running:
        """Return a deployment, empty if nothing is known of it."""
        return self._deployments.get(name) or Running(name)

    def __contains__(self, name: str) -> bool:
        return name in self._deployments

    def apply(self, record: Record) -> None:
        """Take a record in.

        Raises:
            ContractError: it is garbage; the state is as before, but for `unreadable`.
        """
        key = (record.key or b"").decode("utf-8", "replace")
        try:
            value = decode(record)
        except ContractError as error:
            if re.fullmatch(_DEPLOYMENT, key):
                self.unreadable[key] = error.message
            raise
        self.unreadable.pop(key, None)
        name, is_status, replica = key.partition("/")
        running = self._deployments.setdefault(name, Running(name))
        if isinstance(value, Desired):
            running.desired = value
        elif isinstance(value, Status):
            running.replicas[value.replica] = value
        elif is_status:
            running.replicas.pop(replica, None)
        else:
            running.desired = None
        if running.desired is None and not running.replicas:
            del self._deployments[name]
