"""The database's URL that docs/kubernetes.md has people write: whom it trusts, and what is said of a wrong one.

PostgreSQL of the wheel speaks no TLS, so its side is played: the answer to SSLRequest, then real TLS.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigurationError, DependencyError
from pipeline.postgres import migrate
from tests.support import manifests, pods
from tests.support.certificates import Identity
from tests.unit.test_docs import page

pytestmark = manifests.MAY_BUILD
#: https://www.postgresql.org/docs/current/protocol-message-formats.html: length 8, code 80877103.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")


def documented() -> tuple[str, Path]:
    """Return the URL of the walk-through, and the folder that it expects the authority in."""
    (url,) = re.findall(r"`(postgresql://USER@[^`]+)`", page("docs/kubernetes.md"))
    (authority,) = re.findall(r"sslrootcert=([^&]+)", url)
    assert Path(authority).name == "ca.crt"
    return url, Path(authority).parent


@contextlib.asynccontextmanager
async def server(identity: Identity) -> AsyncIterator[tuple[int, list[str]]]:
    """Listen as a PostgreSQL that asks for TLS; list whom a client trusted far enough to say who it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    users: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
            writer.write(b"S")
            await writer.start_tls(context)
            length = int.from_bytes(await reader.readexactly(4), "big")
            startup = (await reader.readexactly(length - 4))[4:].split(b"\0")
            users.append(startup[startup.index(b"user") + 1].decode())
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1], users


def url_for(port: int, authority: Path) -> str:
    """Return the documented URL for a server here."""
    url, folder = documented()
    url = url.replace("USER@HOST:5432/NAME", f"millrace@localhost:{port}/millrace")
    return url.replace(f"{folder}/ca.crt", str(authority))


def test_the_documented_authority_is_where_pods_have_it() -> None:
    """Every pod that has the URL has the secret's folder where the URL looks for the authority."""
    _, folder = documented()
    rendered = manifests.render(manifests.OVERLAYS / "production")
    found = 0
    for _, template in pods.of_ours(rendered):
        volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        for container in manifests.containers(template):
            if "MILLRACE_DATABASE_URL" in pods.environment(container, rendered):
                found += 1
                (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == str(folder))
                secret = volumes[mount["name"]]["secret"]
                assert secret["secretName"] == "millrace-database"
                # Whole: whatever keys there are become files.
                assert not {"items", "subPath"} & (secret.keys() | mount.keys())
    assert found == 7


async def test_only_the_authority_of_the_secret_is_trusted(tmp_path: Path) -> None:
    """With the documented URL a server that the authority signed is told who connects, and no other one is."""
    ours, other = Identity(tmp_path, "ours"), Identity(tmp_path, "other")
    async with server(ours) as (port, users):
        with pytest.raises(DependencyError, match="certificate verify failed"):
            await migrate(url_for(port, other.authority))
        assert users == []
        with pytest.raises(DependencyError):  # it says no more
            await migrate(url_for(port, ours.authority))
        assert users == ["millrace"]


@pytest.mark.parametrize("named", [True, False], ids=["a file that is not there", "no file"])
async def test_an_authority_that_is_missing(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the authority nothing connects, and one line says what is missing where, at once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    url = url_for(9, tmp_path / "ca.crt")
    missing = str(tmp_path / "ca.crt")
    if not named:
        url, missing = url.partition("&sslrootcert")[0], "root.crt"
    with pytest.raises(ConfigurationError, match=re.escape(missing)) as raised:
        await migrate(url)
    assert str(raised.value).startswith("MILLRACE_DATABASE_URL")
