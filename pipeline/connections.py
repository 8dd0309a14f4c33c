"""Reaching the brokers: the options every Kafka client shares, TLS and SASL from files, one ping.

Files are looked at again for each new connection, so certificates and passwords may be rotated under a running
process (`docs/rotation.md`). Nothing here holds a connection open.
"""

import asyncio
import functools
import random
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiokafka import conn as aiokafka_conn
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
)
from aiokafka.protocol.admin import SaslAuthenticateRequest

from pipeline import rotation
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.rotation import Rotated
from pipeline.settings import PREFIX, Settings

CONNECT_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 30.0
# Of the lifetime that the broker gives an authenticated connection; as in Kafka's own client (KIP-368).
_SESSION_SHARE = (0.85, 0.95)
# Between two looks whether the last answer has come on a connection that takes no more requests.
_DRAIN_LOOK_SECONDS = 0.05


# Of an idempotent producer the second means that it may write no topic at all (KIP-679).
_REFUSALS = (TopicAuthorizationFailedError, ClusterAuthorizationFailedError, GroupAuthorizationFailedError)


class UnreachableError(DependencyError):
    """No broker answers, or none what was asked."""


def backoff_seconds(longest: float = MAX_BACKOFF_SECONDS) -> Iterator[float]:
    """Yield waits for ever, doubling from 0.25 s to `longest`, with jitter so that clients spread."""
    wait = 0.25
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(wait * 2, longest)


class _Connection(AIOKafkaConnection):  # type: ignore[misc]
    """aiokafka's connection, with the password of the moment, and left before the broker's session on it ends.

    aiokafka asks for no second authentication (KIP-368): a broker with `connections.max.reauth.ms` would cut the
    connection at the next request. This one takes no requests from a while before; the client opens another, and
    what was asked here is still answered here.
    """

    _on_close_cb: Any
    _sasl_plain_password: Any
    _is_leaving = False
    _leaving: asyncio.TimerHandle | None = None

    async def connect(self) -> Any:
        """Open the connection; with a password that was changed and is refused, by the former one."""
        passwords = self._sasl_plain_password
        if not isinstance(passwords, Rotated):
            return await super().connect()
        connect_by = functools.partial(self._connect_by, self._on_close_cb)
        return await passwords.attempt(connect_by, SaslAuthenticationFailed)

    async def _connect_by(self, on_close: Any, password: str) -> Any:
        self._on_close_cb = on_close  # a refusal before took it away
        self._sasl_plain_password = password
        try:
            return await super().connect()
        finally:
            self._sasl_plain_password = None

    def send(self, request: Any, expect_response: bool = True) -> Any:
        """Send; the answer to an authentication says how long it holds."""
        answer = self._answer(super().send(request, expect_response))
        return self._noting_session(answer) if isinstance(request, SaslAuthenticateRequest) else answer

    def connected(self) -> bool:
        """Whether it takes requests."""
        return not self._is_leaving and super().connected()

    def close(self, reason: Any = None, exc: BaseException | None = None) -> Any:
        """Close at once."""
        if self._leaving is not None:
            self._leaving.cancel()
        return super().close(reason, exc)

    async def _answer(self, answer: Any) -> Any:
        try:
            return await answer
        except TimeoutError:
            if not self._is_leaving:
                raise
            # The client would close the connection that took this one's place, or stumble where there is none yet.
            self.close(CloseReason.CONNECTION_TIMEOUT)
            raise KafkaConnectionError("no answer on a connection that takes no more requests") from None

    async def _noting_session(self, answer: Any) -> Any:
        response = await answer
        if lifetime_ms := getattr(response, "session_lifetime_ms", 0):
            seconds = lifetime_ms / 1000 * random.uniform(*_SESSION_SHARE)
            self._leaving = self._loop.call_later(seconds, self._leave)
        return response

    def _leave(self) -> None:
        self._is_leaving = True
        if self._requests:
            self._leaving = self._loop.call_later(_DRAIN_LOOK_SECONDS, self._leave)
        else:
            self.close(CloseReason.IDLE_DROP)


aiokafka_conn.AIOKafkaConnection = _Connection


class _RotatedTLS(ssl.SSLContext):
    """Stands for what the certificate and authority files say at each new connection."""

    source: Rotated[ssl.SSLContext]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        # asyncio calls this once per connection. A context of its own for each state of the files: one cannot
        # be told to trust an authority no longer.
        return self.source.newest().wrap_bio(*args, **kwargs)


@functools.cache
def _tls(authorities: Path | None, certificate: Path | None, key: Path | None) -> Rotated[ssl.SSLContext]:
    """Follow the TLS files; one for all clients of the process, which keep the last good state in common."""

    def read() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if authorities:
                context.load_verify_locations(cafile=authorities)
            else:
                context.load_default_certs()
            if certificate:
                context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"{names}: cannot be used ({error})") from None
        return context

    names = f"{PREFIX}KAFKA_TLS_CA_FILE, {PREFIX}KAFKA_TLS_CERTIFICATE_FILE or {PREFIX}KAFKA_TLS_KEY_FILE"
    files = [path for path in (authorities, certificate, key) if path]
    return Rotated(f"{PREFIX}KAFKA_TLS_*_FILE", files, read)


@functools.cache
def _password(path: Path) -> Rotated[str]:
    return rotation.password(f"{PREFIX}KAFKA_SASL_PASSWORD_FILE", path)


def client_options(settings: Settings) -> dict[str, Any]:
    """Return what every aiokafka client needs to reach the brokers; it follows the files from then on.

    Raises:
        ConfigurationError: a TLS or password file cannot be used, and never could in this process.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.resolved_kafka,
        "security_protocol": settings.kafka_security_protocol,
    }
    if "SSL" in settings.kafka_security_protocol:
        options["ssl_context"] = context = _RotatedTLS(ssl.PROTOCOL_TLS_CLIENT)
        context.source = _tls(
            settings.kafka_tls_ca_file, settings.kafka_tls_certificate_file, settings.kafka_tls_key_file
        )
    if "SASL" in settings.kafka_security_protocol:
        assert settings.kafka_sasl_password_file is not None  # settings.py refuses this
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            # Not text: `_Connection` asks it for the password of the moment.
            "sasl_plain_password": _password(settings.kafka_sasl_password_file),
        }
    return options


def unreachable(settings: Settings, error: BaseException) -> UnreachableError:
    """Say which brokers did not answer, or refused to, and why as far as the client knows."""
    if isinstance(error, _REFUSALS):
        return UnreachableError(f"Kafka at {settings.resolved_kafka} refuses this user a right ({error})")
    # Bootstrapping fails with the addresses alone, which are said already.
    reason = "" if isinstance(error, KafkaConnectionError) else f" ({str(error) or type(error).__name__})"
    return UnreachableError(f"no Kafka broker answers at {settings.resolved_kafka}{reason}")


async def ping(settings: Settings, timeout_seconds: float = CONNECT_SECONDS) -> None:
    """Connect and ask for metadata once.

    Raises:
        DependencyError: no broker answers in time, or it refuses the credentials.
    """
    client = AIOKafkaClient(**client_options(settings), request_timeout_ms=int(timeout_seconds * 1000))
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.bootstrap()
    except (KafkaError, OSError, TimeoutError) as error:
        raise unreachable(settings, error) from None
    finally:
        await client.close()
