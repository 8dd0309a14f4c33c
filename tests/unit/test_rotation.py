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
    assert followed.candidates() == ("first",)
    mounted.replace({"password": "second\n"})
    assert followed.newest() == "second"


def test_another_file_of_the_secret_is_replaced(mounted: MountedSecret, followed: Rotated[str]) -> None:
    """A swap that leaves the content as it was offers nothing new."""
    mounted.replace({"other": "y"})
    assert followed.candidates() == ("first",)


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


def test_what_is_refused_is_followed_by_what_was_accepted(
    mounted: MountedSecret, followed: Rotated[str], logged: LogCapture
) -> None:
    """The newest is tried first, always; the one that worked last stays until another works."""
    followed.accept("first")
    mounted.replace({"password": "wrong"})
    assert followed.candidates() == ("wrong", "first")
    followed.accept("first")
    assert logged.entries[-1]["event"].startswith("changed secret is refused")
    mounted.replace({"password": "second"})
    assert followed.candidates() == ("second", "first")
    followed.accept("second")
    assert followed.candidates() == ("second",)


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


def test_secrets_are_never_logged(mounted: MountedSecret, followed: Rotated[str], logged: LogCapture) -> None:
    """Neither the former nor the new content is in any line."""
    mounted.replace({"password": "tomato-soup"})
    followed.newest()
    followed.accept("first")
    assert logged.entries[0]["event"] == "changed secret was read"
    assert "tomato-soup" not in str(logged.entries)
