"""A broker that allows each KafkaUser what its manifest says and nothing else: StandardAuthorizer and SCRAM.

The tests' own connections come by another listener, as a superuser. Requests that ask for a right are sent as they
are, past what a client would look up first, so that the answer is the authorizer's.
"""

import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResourceType
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError, for_code
from aiokafka.protocol.admin import (
    AlterConfigsRequest,
    CreateAclsRequest,
    CreatePartitionsRequest,
    DeleteAclsRequest,
    DeleteRecordsRequest,
    DescribeConfigsRequest,
    Request,
)
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from millrace import ports
from millrace.kafka import EmbeddedKafka
from pipeline.connections import client_options
from pipeline.settings import PREFIX, Settings, load
from tests.support.eventually import eventually
from tests.support.manifests import Manifest

NODE = 1
# org.apache.kafka.common: ResourceType, PatternType, AclOperation, AclPermissionType
_TYPES = {"topic": 2, "group": 3, "cluster": 4, "transactionalId": 5}
_PATTERNS = {"literal": 3, "prefix": 4}
_OPERATIONS = {
    "All": 2, "Read": 3, "Write": 4, "Create": 5, "Delete": 6, "Alter": 7, "Describe": 8, "ClusterAction": 9,
    "DescribeConfigs": 10, "AlterConfigs": 11, "IdempotentWrite": 12,
}  # fmt: skip
_ALLOW = 3
# As the authorizer's log has them.
_SHOUTED = {"Describe": "DESCRIBE", "DescribeConfigs": "DESCRIBE_CONFIGS", "Read": "READ", "Write": "WRITE"}


@dataclass(frozen=True)
class Right:
    """One operation that one user may do with one resource."""

    user: str
    type: str
    name: str
    pattern: str
    operation: str

    def __str__(self) -> str:
        star = "*" if self.pattern == "prefix" else ""
        return f"{self.user}: {self.operation} {self.type} {self.name}{star}"


def rights_of(users: Iterable[Manifest]) -> list[Right]:
    """Return what KafkaUsers may do, one operation each."""
    return [
        Right(
            user["metadata"]["name"],
            acl["resource"]["type"],
            acl["resource"]["name"],
            acl["resource"].get("patternType", "literal"),
            operation,
        )
        for user in users
        for acl in user["spec"]["authorization"]["acls"]
        for operation in acl["operations"]
    ]


class Guarded:
    """The broker, and how each user reaches it."""

    def __init__(self, folder: Path, users: Iterable[str]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        plain, controller, sasl = (ports.find_free() for _ in range(3))
        addresses = {"PLAINTEXT": plain, "CONTROLLER": controller, "SASL": sasl}
        listeners = {name: f"{name}://127.0.0.1:{port}" for name, port in addresses.items()}
        self.address = f"127.0.0.1:{sasl}"
        scram = []
        for user in users:
            (folder / user).write_text(f"secret-of-{user}\n")
            scram += ["--add-scram", f"SCRAM-SHA-512=[name={user},password=secret-of-{user}]"]
        self.kafka = EmbeddedKafka(
            folder / "data",
            plain,
            controller,
            properties={
                "listeners": ",".join(listeners.values()),
                "advertised.listeners": f"{listeners['PLAINTEXT']},{listeners['SASL']}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT",
                "sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "listener.name.sasl.scram-sha-512.sasl.jaas.config": (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                ),
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                # Who comes by the listener without passwords: the broker itself, and the tests.
                "super.users": "User:ANONYMOUS",
            },
            format_options=scram,
        )

    def values(self, user: str) -> dict[str, str]:
        """Return the settings of a user's connection."""
        return {
            "kafka_bootstrap_servers": self.address,
            "kafka_security_protocol": "SASL_PLAINTEXT",
            "kafka_sasl_username": user,
            "kafka_sasl_password_file": str(self._folder / user),
        }

    def environment(self, user: str) -> dict[str, str]:
        """Return the same as variables."""
        return {PREFIX + name.upper(): value for name, value in self.values(user).items()}

    async def grant(self, rights: Iterable[Right]) -> None:
        """Create ACLs."""
        await self._change(CreateAclsRequest, rights)

    async def revoke(self, right: Right) -> None:
        """Delete one ACL."""
        await self._change(DeleteAclsRequest, [right])

    def denied(self, right: Right) -> bool:
        """Whether the authorizer has refused this right, or the Describe that it implies."""
        kinds = {"topic": "Topic", "group": "Group", "transactionalId": "TransactionalId"}
        whole = "" if right.pattern == "prefix" else r"\b"
        refused = re.compile(
            rf"User:{re.escape(right.user)} is Denied operation = ({_SHOUTED[right.operation]}|DESCRIBE) .* "
            rf"on resource = {kinds[right.type]}:LITERAL:{re.escape(right.name)}{whole}"
        )
        logs = self.kafka.log_path.parent.glob(f"{self.kafka.log_path.name}*")  # it is rotated
        return any(refused.search(log.read_text()) for log in logs)

    async def _change(self, request: Any, rights: Iterable[Right]) -> None:
        wanted = list(rights)

        async def changed() -> bool:
            try:
                async with connected(load(kafka_bootstrap_servers=self.kafka.bootstrap_servers)) as admin:
                    for right in wanted:
                        await self._send(admin, request, right)
            except (KafkaConnectionError, NodeNotReadyError):
                return False
            return True

        await eventually(changed, 30.0)

    async def _send(self, admin: AIOKafkaAdminClient, request: Any, right: Right) -> None:
        response = await admin._send_request(
            request(
                _TYPES[right.type], right.name, _PATTERNS[right.pattern], f"User:{right.user}", "*",
                _OPERATIONS[right.operation], _ALLOW,
            )
        )  # fmt: skip
        assert _answer(response) == "NoError", right


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Connect an admin client as a user."""
    admin = AIOKafkaAdminClient(**client_options(settings))
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def write(admin: AIOKafkaAdminClient, topic: str) -> str:
    """Publish one record; return the broker's answer."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
        batch_size=1000,
    )  # fmt: skip
    # Of now: retention would take an old one, and all that is with it.
    builder.append(0, timestamp=time.time_ns() // 1_000_000, key=None, value=b"x", headers=[])
    return await _ask(admin, ProduceRequest(None, -1, 5000, [(topic, [(0, bytes(builder.build()))])]))


async def read(admin: AIOKafkaAdminClient, topic: str) -> str:
    """Fetch from the beginning of a topic; return the broker's answer."""
    return await _ask(admin, FetchRequest(0, 0, 1, 0, [(topic, [(0, 0, 1)])]))


async def commit(admin: AIOKafkaAdminClient, group: str, topic: str) -> str:
    """Commit for a group, as its members do; return the broker's answer."""
    return await _ask(admin, OffsetCommitRequest(group, -1, "", -1, [(topic, [(0, 0, "")])]))


async def activate(admin: AIOKafkaAdminClient, transactional_id: str) -> str:
    """Begin to write in transactions; return the broker's answer."""
    return await _ask(admin, InitProducerIdRequest(transactional_id, 10_000))


async def describe_configs(admin: AIOKafkaAdminClient, topic: str) -> str:
    """Ask for a topic's configuration; return the broker's answer."""
    return await _ask(admin, DescribeConfigsRequest([(ConfigResourceType.TOPIC, topic, None)], False))


async def destructive(admin: AIOKafkaAdminClient, topic: str) -> dict[str, str]:
    """Try what nobody may do with a topic or the cluster; return the broker's answers."""
    created = await admin.create_topics([NewTopic("someone.elses", 1, 1)])
    deleted = await admin.delete_topics([topic])
    records = admin._convert_records_to_delete({topic: [(0, RecordsToDelete(1))]})
    requests: dict[str, Request[Any]] = {
        "add partitions": CreatePartitionsRequest([(topic, (9, []))], 5000, False),
        "alter config": AlterConfigsRequest([(ConfigResourceType.TOPIC, topic, [("retention.ms", "1")])]),
        "delete records": DeleteRecordsRequest(records, 5000),
        "grant itself": CreateAclsRequest(
            _TYPES["topic"], topic, _PATTERNS["literal"], "User:*", "*", _OPERATIONS["All"], _ALLOW
        ),
    }
    answers = {what: await _ask(admin, request) for what, request in requests.items()}
    return answers | {"create topic": _answer(created), "delete topic": _answer(deleted)}


async def _ask(admin: AIOKafkaAdminClient, request: Request[Any]) -> str:
    """Send a request to the one node; return the name of the first error in the answer, or NoError."""
    return _answer(await admin._client.send(NODE, request))


def _answer(response: Any) -> str:
    codes = _codes(response)
    assert codes, response
    return str(for_code(next((code for code in codes if code), 0)).__name__)


def _codes(response: Any) -> list[int]:
    """Return every error code in an answer, wherever it is."""
    found: list[int] = []

    def look(value: object) -> None:
        if isinstance(value, dict):
            found.extend(code for name, code in value.items() if name == "error_code")
            for each in value.values():
                look(each)
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)

    look(response.to_object())
    return found
