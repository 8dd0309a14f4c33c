"""API keys: one per line of `MILLRACE_API_KEYS_FILE`; a rotated file is read again without a restart.

Owns who may use `/v1`. Without a file there are no keys, and `Settings` then allows only loopback. Health,
metrics and the API's description stay open: they carry no pictures and no results. Keys are never logged.
"""

import hashlib
import hmac
import time
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from gateway.problems import Problem
from pipeline.errors import ConfigurationError
from pipeline.rotation import Rotated
from pipeline.settings import PREFIX

# A revoked key works at most this long; looking at the file's time more often than that helps nobody.
LOOK_INTERVAL_SECONDS = 1.0
SETTING = f"{PREFIX}API_KEYS_FILE"


class Keys:
    """The accepted API keys, as digests, following their file."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigurationError: it cannot be read or contains no key.
        """
        self._file = Rotated(SETTING, [path], lambda: _read(path))
        self._looked_at = time.monotonic()
        self._digests = self._file.newest()
        if not self._digests:
            raise ConfigurationError(f"{SETTING}: {path}: contains no key")

    def accepts(self, given: str) -> bool:
        """Whether `given` is a key now; the time taken tells nothing about the keys."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_INTERVAL_SECONDS:
            self._looked_at = now
            # What cannot be read locks nobody out; an empty file, in contrast, means nobody.
            self._digests = self._file.newest()
        digest = _digest(given.encode("latin-1", "replace"))  # as header bytes were decoded
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


_bearer = HTTPBearer(auto_error=False, description="`Authorization: Bearer KEY`")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="`X-API-Key: KEY`")


async def require_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    header: Annotated[str | None, Security(_header)],
) -> None:
    """Refuse the request unless it carries a valid key, or none are configured.

    A coroutine only because FastAPI runs plain functions in a thread, which costs more than the check.

    Raises:
        Problem: 401.
    """
    keys: Keys | None = request.app.state.keys
    if keys is None:
        return
    given = bearer.credentials if bearer else header
    if given is not None and keys.accepts(given):
        return
    reason = (
        "This API key is not valid." if given else "Send `Authorization: Bearer KEY` or `X-API-Key: KEY`."
    )
    challenge = 'Bearer realm="millrace"' + (', error="invalid_token"' if given else "")
    raise Problem("unauthorized", reason, headers={"WWW-Authenticate": challenge})


KeyRequired = Depends(require_key)


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ConfigurationError(f"{SETTING}: {path}: is not UTF-8 text") from None
    return tuple(_digest(line.encode()) for line in lines if line and not line.startswith("#"))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
