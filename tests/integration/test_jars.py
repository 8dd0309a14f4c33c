"""Fetching Kafka's jars, from a Maven repository on loopback that can be made to misbehave."""

import gc
import hashlib
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from millrace import jars
from pipeline.errors import ConfigurationError, DependencyError

# jgo leaves the connection of an answer open that it did not like; the collector finds it sooner or later.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

CONTENTS = {"org.example:first:1.0": b"first jar" * 1000, "org.example:second:2.0": b"second jar" * 1000}


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and keeps no log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def remote_path(repository: Path, coordinate: str) -> Path:
    group, name, version = coordinate.split(":")
    return repository / group.replace(".", "/") / name / version / f"{name}-{version}.jar"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve a repository with two jars in place of Maven Central, and pin those two."""
    root = tmp_path / "repository"
    for coordinate, content in CONTENTS.items():
        path = remote_path(root, coordinate)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    pins = tmp_path / "pins.txt"
    rows = (
        f"{hashlib.sha256(content).hexdigest()}  {coordinate}\n" for coordinate, content in CONTENTS.items()
    )
    pins.write_text("# a comment\n" + "".join(rows))
    monkeypatch.setattr(jars, "_PINS", pins)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        settings = tmp_path / "jgo.conf"
        settings.write_text(f"[repositories]\ncentral = http://127.0.0.1:{server.server_port}\n")
        monkeypatch.setenv("JGO_CONFIG_FILE", str(settings))
        yield root
        server.shutdown()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


def test_fetches_what_is_missing_once(tmp_path: Path, repository: Path) -> None:
    """Every pinned jar is fetched and counted; with a full cache the repository is not asked again."""
    progress: list[tuple[int, int]] = []
    cache = tmp_path / "cache"
    paths = jars.kafka_classpath(cache, lambda done, needed: progress.append((done, needed)))
    assert list(CONTENTS.values()) == [path.read_bytes() for path in paths]
    assert progress == [(1, 2), (2, 2)]

    for coordinate in CONTENTS:
        remote_path(repository, coordinate).unlink()
    assert paths == jars.kafka_classpath(cache, lambda *_: pytest.fail("fetched again"))


def test_a_damaged_download_is_refused_and_fetched_again(tmp_path: Path, repository: Path) -> None:
    """A jar whose content is not the pinned one never enters the cache, and the next start fetches it."""
    cache = tmp_path / "cache"
    damaged = remote_path(repository, "org.example:second:2.0")
    damaged.write_bytes(CONTENTS["org.example:second:2.0"][:-1])
    with pytest.raises(DependencyError, match=r"org\.example:second:2\.0: SHA-256 is .* damaged"):
        jars.kafka_classpath(cache)
    assert not (cache / "second-2.0.jar").exists()

    damaged.write_bytes(CONTENTS["org.example:second:2.0"])
    assert list(CONTENTS.values()) == [path.read_bytes() for path in jars.kafka_classpath(cache)]


def test_remains_of_a_killed_download_do_no_harm(tmp_path: Path, repository: Path) -> None:
    """What a process left that was killed while it fetched is removed and replaced."""
    cache = tmp_path / "cache"
    remains = cache / "fetching-dead"
    remains.mkdir(parents=True)
    remote = remote_path(remains, "org.example:first:1.0")
    remote.parent.mkdir(parents=True)
    remote.write_bytes(b"half")
    assert list(CONTENTS.values()) == [path.read_bytes() for path in jars.kafka_classpath(cache)]
    assert list(cache.glob("fetching-*")) == []


@pytest.mark.parametrize("reachable", [True, False])
def test_without_a_repository_one_line_says_what_to_do(
    tmp_path: Path, repository: Path, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network, or no such jar, is one line with the cache folder and the setting that needs no jars."""
    if reachable:
        remote_path(repository, "org.example:first:1.0").unlink()
    else:
        settings = tmp_path / "nowhere.conf"
        settings.write_text("[repositories]\ncentral = http://127.0.0.1:1\n")
        monkeypatch.setenv("JGO_CONFIG_FILE", str(settings))
    cache = tmp_path / "cache"
    with pytest.raises(DependencyError) as raised:
        jars.kafka_classpath(cache)
    message = raised.value.message
    assert "\n" not in message
    assert "cannot fetch Kafka" in message
    assert str(cache) in message
    assert "MILLRACE_KAFKA_BOOTSTRAP_SERVERS" in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, repository: Path) -> None:
    """A cache folder that cannot be made is a wrong setting, and the line names the variable."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigurationError, match="XDG_CACHE_HOME"):
        jars.kafka_classpath(tmp_path / "file" / "cache")


def test_two_processes_fetch_once(tmp_path: Path, repository: Path) -> None:
    """Of two that start with an empty cache one fetches, and both get every jar."""
    progress: list[int] = []
    results: list[list[Path]] = []

    def start() -> None:
        results.append(jars.kafka_classpath(tmp_path / "cache", lambda done, _: progress.append(done)))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert sorted(progress) == [1, 2]
