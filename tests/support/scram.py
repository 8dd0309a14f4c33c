"""SCRAM users of an embedded broker, made as an administrator makes them (KIP-554), without a JVM for each."""

import hashlib
import secrets
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import for_code
from aiokafka.protocol.admin import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from millrace.kafka import EmbeddedKafka
from tests.support import services

#: Broker property of a listener that takes SCRAM passwords.
JAAS = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
_SHA_512 = 2
_ITERATIONS = 4096  # Kafka's least


class _Altered(Response):  # type: ignore[misc]
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString()),
                ("error_code", Int16),
                ("error_message", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _AlterStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 51
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _Altered
    SCHEMA = Schema(
        ("deletions", CompactArray(("name", CompactString()), ("mechanism", Int8), ("tags", TaggedFields))),
        (
            "upsertions",
            CompactArray(
                ("name", CompactString()),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _Alter(Request[_AlterStruct]):  # type: ignore[misc]
    API_KEY = 51

    def __init__(self, user: str, password: str) -> None:
        salt = secrets.token_bytes(16)
        salted = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
        self._upsertion: tuple[Any, ...] = (user, _SHA_512, _ITERATIONS, salt, salted, {})

    def build(self, request_struct_class: type[_AlterStruct]) -> _AlterStruct:
        return request_struct_class([], [self._upsertion], {})


def set_password(kafka: EmbeddedKafka, user: str, password: str) -> None:
    """Give a user a password, the first or another one; blocks until the broker has it."""
    answer = services.run_apart(_send(kafka.bootstrap_servers, _Alter(user, password)))
    for _, code, message, _ in answer.results:
        if code:
            raise AssertionError(f"{for_code(code).__name__}: {message}")


async def _send(bootstrap_servers: str, request: _Alter) -> Any:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        return await admin._send_request(request)
    finally:
        await admin.close()
