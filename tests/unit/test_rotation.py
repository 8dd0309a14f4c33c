"""Secrets in files that change: what is offered at every moment."""

from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import LogCapture

from pipeline import rotation
from pipeline.errors import ConfigurationError
from pipeline.rotation import Rotated
from tests.support.logged import capture
from tests.support.mounts import MountedSecret


class RefusedError(Exception):
    """What a client raises of a wrong password."""


class Server:
    """Lets in by one password, or is away."""

    def __init__(self, password: str | None) -> None:
        self.password = password
        self.tried: list[str] = []

    async def connect(self, password: str) -> str:
        self.tried.append(password)
        if self.password is None:
            raise ConnectionError
        if password != self.password:
            raise RefusedError(password)
        return f"connected by {password}"


@pytest.fixture
def mounted(tmp_path: Path) -> MountedSecret:
    return MountedSecret(tmp_path / "mounted", {"password": "first\n", "other": "x"})


@pytest.fixture
def followed(mounted: MountedSecret) -> Rotated[str]:
    return rotation.password("SETTING", mounted / "password")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    return capture(monkeypatch, rotation)


def test_a_file_that_kubernetes_replaces(mounted: MountedSecret, followed: Rotated[str]) -> None:
    """The next look after the kubelet swapped the folder finds the new content."""
    assert followed.newest() == "first"
    mounted.replace({"password": "second\n"})
    assert followed.newest() == "second"


async def test_another_file_of_the_secret_is_replaced(mounted: MountedSecret, followed: Rotated[str]) -> None:
    """A swap that leaves the content as it was offers nothing new."""
    mounted.replace({"other": "y"})
    server = Server("second")
    with pytest.raises(RefusedError):
        await followed.attempt(server.connect, RefusedError)
    assert server.tried == ["first"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text(" \n"), "is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not text"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_used(
    spoil: Callable[[Path], object], reason: str, tmp_path: Path, logged: LogCapture
) -> None:
    """What could be read once is kept, is said once, and gives way to what is whole again."""
    path = tmp_path / "password"
    path.write_text("first")
    followed = rotation.password("SETTING", path)
    spoil(path)
    assert [followed.newest() for _ in range(3)] == ["first"] * 3
    [said] = logged.entries
    assert said["event"].startswith("changed secret cannot be used")
    assert said["setting"] == "SETTING"
    assert reason in said["reason"]
    with pytest.raises(ConfigurationError, match=reason):
        rotation.password("SETTING", path)
    if path.is_dir():
        path.rmdir()
    path.write_text("second")
    assert followed.newest() == "second"


async def test_what_is_refused_is_followed_by_what_was_accepted(
    mounted: MountedSecret, followed: Rotated[str], logged: LogCapture
) -> None:
    """The newest is tried first, always; the one that worked last stays until another works."""
    server = Server("first")
    mounted.replace({"password": "wrong"})
    for _ in range(2):
        assert await followed.attempt(server.connect, RefusedError) == "connected by first"
    assert [entry["event"] for entry in logged.entries] == [
        "changed secret was read", "changed secret is refused, the former one is not",
    ]  # fmt: skip
    mounted.replace({"password": "second"})
    assert await followed.attempt(server.connect, RefusedError) == "connected by first"
    server.password = "second"
    assert await followed.attempt(server.connect, RefusedError) == "connected by second"
    server.password = "first"
    with pytest.raises(RefusedError, match="second"):
        await followed.attempt(server.connect, RefusedError)
    assert server.tried == ["wrong", "first"] * 2 + ["second", "first"] + ["second"] * 2


async def test_what_fails_otherwise_is_no_refusal(mounted: MountedSecret, followed: Rotated[str]) -> None:
    """Only a refusal makes the former password be tried: a server that is away refuses none."""
    server = Server(None)
    mounted.replace({"password": "second"})
    with pytest.raises(ConnectionError):
        await followed.attempt(server.connect, RefusedError)
    assert server.tried == ["second"]


def test_a_change_while_it_is_read(tmp_path: Path) -> None:
    """What changes between two looks of one reading is read again at the next."""
    path = tmp_path / "file"
    path.write_text("first")

    def read() -> str:
        found = path.read_text()
        if found == "first":
            path.write_text("second")
        return found

    followed = Rotated("SETTING", [path], read)
    assert followed.newest() == "second"


async def test_secrets_are_never_logged(
    mounted: MountedSecret, followed: Rotated[str], logged: LogCapture
) -> None:
    """Neither the former nor the new content is in any line."""
    mounted.replace({"password": "tomato-soup"})
    await followed.attempt(Server("first").connect, RefusedError)
    assert logged.entries[0]["event"] == "changed secret was read"
    assert "tomato-soup" not in str(logged.entries)
