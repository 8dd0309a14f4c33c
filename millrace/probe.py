"""Asks a broker, in Kafka's own protocol and blocking, whether it really serves; needs no client."""

import socket
import struct

_PROBE_SECONDS = 2.0  # one request on loopback


def serving_cluster(host: str, port: int) -> str | None:
    """Ask a broker for its cluster's id; None unless it answers and has itself unfenced.

    Accepting connections says little: a broker does that before it has joined its own cluster. So this sends
    a Metadata request, version 4 (https://kafka.apache.org/protocol), and counts the brokers in the answer.
    """
    try:
        with socket.create_connection((host, port), _PROBE_SECONDS) as connection:
            connection.settimeout(_PROBE_SECONDS)
            # api_key 3, api_version 4, correlation_id 1, no client_id, no topics, no auto-creation
            request = struct.pack(">hhihi?", 3, 4, 1, -1, 0, False)
            connection.sendall(struct.pack(">i", len(request)) + request)
            with connection.makefile("rb") as stream:
                (length,) = struct.unpack(">i", stream.read(4))
                return _read_metadata(stream.read(length))
    except (OSError, struct.error, UnicodeDecodeError):
        return None


def _read_metadata(body: bytes) -> str | None:
    _, _, brokers = struct.unpack_from(">iii", body)  # correlation_id, throttle_time_ms, brokers
    position = 12
    for _ in range(brokers):
        position += 4  # node_id
        _, position = _read_string(body, position)  # host
        position += 4  # port
        _, position = _read_string(body, position)  # rack
    cluster_id, _ = _read_string(body, position)
    return cluster_id if brokers > 0 else None


def _read_string(body: bytes, position: int) -> tuple[str | None, int]:
    (length,) = struct.unpack_from(">h", body, position)
    position += 2
    if length < 0:
        return None, position
    return body[position : position + length].decode(), position + length
