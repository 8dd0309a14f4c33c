"""Lengths of time and moments as people type them: 90d, 12h, 5m, 100ms, or seconds without a unit; ISO 8601."""

import re
from datetime import UTC, datetime, timedelta

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def parse(text: str) -> timedelta:
    """Read a length of time.

    Raises:
        ValueError: It is none; the message says what is.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|[smhdw]?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no length of time such as 30s, 5m, 12h or 90d")
    return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])


def moment(text: str) -> datetime:
    """Read how long ago (5m), or a moment (ISO 8601, UTC without a zone).

    Raises:
        ValueError: It is neither; the message says what is.
    """
    try:
        return datetime.now(UTC) - parse(text)
    except (ValueError, OverflowError):
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no age such as 5m and no time such as 2026-01-31T12:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
