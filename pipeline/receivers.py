"""Receivers: who is told of an alert, and how; read from `MILLRACE_RECEIVERS_FILE`.

The file is YAML, and followed when it changes. URLs are an operator's word and are called as they are, so whoever
can write the file can have this machine call any address; nothing that arrives on a topic or over HTTP names one.
Secrets stay in files of their own, which may be rotated. Matching is pure.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from pipeline.errors import ConfigurationError
from pipeline.rotation import Rotated
from pipeline.settings import PREFIX
from pipeline.telemetry import Alert

Kind = Literal["webhook", "slack", "alertmanager"]
#: Values may have the wildcards * and ?; one of several suffices, and each label must fit.
Match = Mapping[str, "str | tuple[str, ...]"]

SETTING = f"{PREFIX}RECEIVERS_FILE"
#: What an alert has beside the labels of its condition.
LABELS = ("rule", "severity", "host", "gpu_uuid", "model", "action", "field")
_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
# Standard Webhooks 1.0.0: 24 to 64 random bytes.
_SECRET_PREFIX = "whsec_"
_SECRET_BYTES = range(24, 65)

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=7 * 24 * 3600)]


_encoder = msgspec.json.Encoder()


class Receiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One receiver of alerts."""

    name: Name
    kind: Kind
    url: str | None = None
    #: A URL that is a secret, as Slack's are.
    url_file: str | None = None
    #: `whsec_…`, one per line; with several, each signs (rotation).
    secret_file: str | None = None
    match: dict[str, str | tuple[str, ...]] = {}
    send_resolved: bool = True
    #: Transitions that agree in these labels and arrive together are one message; none: one each.
    group_by: tuple[str, ...] = ()
    #: How long a message waits for others of its group.
    group_wait_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    #: Of one attempt.
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 15.0
    #: A message that nobody took for so long is given up.
    give_up_seconds: Seconds = timedelta(days=3).total_seconds()
    #: An Alertmanager forgets what is not said again; see docs/telemetry.md.
    resend_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0

    def wants(self, alert: Alert) -> bool:
        """Whether this receiver is told of a transition; of a pending one nobody is."""
        if alert.state == "pending" or (alert.state == "resolved" and not self.send_resolved):
            return False
        return fits(self.match, labels_of(alert))

    def group_key(self, alert: Alert) -> str:
        """Return what transitions must agree in to share a message."""
        if self.kind == "alertmanager":
            return ""  # it groups by itself, and takes many in one request
        return _encoder.encode(self.group_labels(alert)).decode() if self.group_by else alert.id

    def group_labels(self, alert: Alert) -> dict[str, str]:
        """Return the labels that it groups by, as an alert has them."""
        labels = labels_of(alert)
        return {name: labels.get(name, "") for name in self.group_by}

    def address(self) -> str:
        """Return the URL, read from its file where it is one.

        Raises:
            ConfigurationError: it is none; the message does not quote it.
        """
        url = self.url if self.url is not None else _read(self, "url_file", self.url_file).strip()
        try:
            parts = urlsplit(url)
            is_usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_usable = False
        if not is_usable:
            raise ConfigurationError(f"{SETTING}: {self.name}: its URL is none of http:// or https://")
        if self.kind == "alertmanager" and not parts.path.rstrip("/").endswith("/api/v2/alerts"):
            return url.rstrip("/") + "/api/v2/alerts"
        return url

    def secrets(self) -> list[bytes]:
        """Return the keys that sign; none: nothing is signed.

        Raises:
            ConfigurationError: the file cannot be read, or has no key.
        """
        if self.secret_file is None:
            return []
        lines = [line.strip() for line in _read(self, "secret_file", self.secret_file).splitlines()]
        keys = []
        for line in filter(None, lines):
            try:
                key = base64.b64decode(line.removeprefix(_SECRET_PREFIX), validate=True)
            except (binascii.Error, ValueError):
                key = b""
            if not line.startswith(_SECRET_PREFIX) or len(key) not in _SECRET_BYTES:
                raise ConfigurationError(
                    f"{SETTING}: {self.name}: secret_file: a line is not whsec_ and base64 of 24 to 64 bytes"
                )
            keys.append(key)
        if not keys:
            raise ConfigurationError(f"{SETTING}: {self.name}: secret_file: there is no key in it")
        return keys


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    receivers: tuple[Receiver, ...]


def follow(path: Path) -> Rotated[tuple[Receiver, ...]]:
    """Read the file as `read` does, and again when it changes; a file that cannot be used changes nothing.

    Raises:
        ConfigurationError: as `read` does.
    """
    return Rotated(SETTING, [path], lambda: read(path))


def read(path: Path) -> tuple[Receiver, ...]:
    """Read and check the file of receivers.

    Raises:
        ConfigurationError: one line that says what is wrong, and in which receiver.
    """
    try:
        receivers = msgspec.yaml.decode(path.read_bytes(), type=_File).receivers
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise ConfigurationError(f"{SETTING}: {path}: {reason}") from None
    names = [receiver.name for receiver in receivers]
    for receiver in receivers:
        if names.count(receiver.name) > 1:
            raise ConfigurationError(f"{SETTING}: {receiver.name}: there are several of this name")
        _check(receiver)
    return receivers


def labels_of(alert: Alert) -> dict[str, str]:
    """Return what an alert can be matched, silenced and grouped by; our own names win."""
    condition = alert.condition
    ours = {
        "rule": condition.rule,
        "severity": condition.severity,
        "host": alert.host,
        "gpu_uuid": alert.gpu_uuid,
        "model": alert.model,
        "action": condition.action,
        "field": condition.field,
    }
    return condition.labels | {name: value for name, value in ours.items() if value is not None}


def fits(match: Match, labels: Mapping[str, str]) -> bool:
    """Whether every label fits one of its patterns; a label that is not there fits only the empty one."""
    return all(
        any(
            fnmatchcase(labels.get(name, ""), pattern)
            for pattern in ([wanted] if isinstance(wanted, str) else wanted)
        )
        for name, wanted in match.items()
    )


def check_match(match: Match) -> None:
    """See that labels and patterns can be used.

    Raises:
        ValueError: the message says which cannot.
    """
    for name, wanted in match.items():
        if not _LABEL.fullmatch(name):
            raise ValueError(f"{name[:80]!r} cannot be the name of a label")
        patterns = [wanted] if isinstance(wanted, str) else wanted
        if not patterns or any(len(pattern) > 255 or "\x00" in pattern for pattern in patterns):
            raise ValueError(f"{name}: there must be a value, of 255 characters at most")


def _check(receiver: Receiver) -> None:
    where = f"{SETTING}: {receiver.name}"
    if (receiver.url is None) == (receiver.url_file is None):
        raise ConfigurationError(f"{where}: give either url or url_file")
    if receiver.secret_file is not None and receiver.kind != "webhook":
        raise ConfigurationError(f"{where}: secret_file signs webhooks only")
    try:
        check_match(receiver.match)
    except ValueError as error:
        raise ConfigurationError(f"{where}: match: {error}") from None
    receiver.address()
    receiver.secrets()


def _read(receiver: Receiver, name: str, path: str | None) -> str:
    assert path is not None
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ConfigurationError(f"{SETTING}: {receiver.name}: {name}: {path}: {reason}") from None
