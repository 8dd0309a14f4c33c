"""Reaching the brokers: the options every Kafka client shares, TLS and SASL from files, one ping.

Files are read again when they change, so certificates and passwords may be rotated under a running process.
Nothing here holds a connection open.
"""

import asyncio
import os
import random
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaConnectionError, KafkaError

from pipeline import logs
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.settings import PREFIX, Settings

CONNECT_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 30.0

Stamp = tuple[tuple[int, int], ...]

_log = logs.get(__name__)


class UnreachableError(DependencyError):
    """No broker answers."""


def backoff_seconds(longest: float = MAX_BACKOFF_SECONDS) -> Iterator[float]:
    """Yield waits for ever, doubling from 0.25 s to `longest`, with jitter so that clients spread."""
    wait = 0.25
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(wait * 2, longest)


class _RotatedTLS(ssl.SSLContext):
    """Reads certificate and authority files again when they changed, at each new connection."""

    files: tuple[Path | None, Path | None, Path | None] = (None, None, None)
    stamp: Stamp | None = None

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        # asyncio calls this once per connection.
        try:
            self.read()
        except (OSError, ConfigurationError) as error:
            _log.warning("changed TLS files cannot be read, keeping the old ones", error=str(error))
        return super().wrap_bio(*args, **kwargs)

    def read(self) -> None:
        stamp = _stamp(self.files)
        if stamp == self.stamp:
            return
        authorities, certificate, key = self.files
        try:
            if authorities:
                self.load_verify_locations(cafile=authorities)
            if certificate:
                self.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            names = (
                f"{PREFIX}KAFKA_TLS_CA_FILE, {PREFIX}KAFKA_TLS_CERTIFICATE_FILE or {PREFIX}KAFKA_TLS_KEY_FILE"
            )
            raise ConfigurationError(f"{names}: cannot be used ({error})") from None
        self.stamp = stamp


def _stamp(files: Sequence[Path | None]) -> Stamp:
    # Inode too: Kubernetes swaps a symbolic link, and the new file may be as old as the one before.
    found = (os.stat(path) for path in files if path)
    return tuple((file.st_mtime_ns, file.st_ino) for file in found)


def credential_stamp(settings: Settings) -> Stamp:
    """Return a value that changes when a credential which aiokafka reads only once was rotated."""
    try:
        return _stamp((settings.kafka_sasl_password_file,))
    except OSError:
        return ()


def client_options(settings: Settings) -> dict[str, Any]:
    """Return what every aiokafka client needs to reach the brokers; reads the files again at each call.

    Raises:
        ConfigurationError: a TLS or password file cannot be used.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.resolved_kafka,
        "security_protocol": settings.kafka_security_protocol,
    }
    if "SSL" in settings.kafka_security_protocol:
        context = _RotatedTLS(ssl.PROTOCOL_TLS_CLIENT)
        context.files = (
            settings.kafka_tls_ca_file, settings.kafka_tls_certificate_file, settings.kafka_tls_key_file,
        )  # fmt: skip
        if settings.kafka_tls_ca_file is None:
            context.load_default_certs()
        context.read()
        options["ssl_context"] = context
    if "SASL" in settings.kafka_security_protocol:
        assert settings.kafka_sasl_password_file is not None  # settings.py refuses this
        try:
            password = settings.kafka_sasl_password_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{PREFIX}KAFKA_SASL_PASSWORD_FILE: {error}") from None
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": password,
        }
    return options


def unreachable(settings: Settings, error: BaseException) -> UnreachableError:
    """Say which brokers did not answer, and why as far as the client knows."""
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
