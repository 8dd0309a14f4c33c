"""Lengths of time as people type them: 90d, 12h, 5m, 30s, or seconds without a unit."""

import re
from datetime import timedelta

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def parse(text: str) -> timedelta:
    """Read a length of time.

    Raises:
        ValueError: It is none; the message says what is.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhdw]?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no length of time such as 30s, 5m, 12h or 90d")
    return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
