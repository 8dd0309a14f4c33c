"""The jar files of Apache Kafka: fetched once from Maven Central by coordinate, checked, kept in a cache.

The pins in `kafka_jars.txt` are to Java what the hashed requirements are to Python. A jar enters the cache
only under its final name and only when its SHA-256 is the pinned one, so a download that was cut off can
never be mistaken for a whole one, and a start with a full cache reads nothing but the folder.

`python -m millrace.jars > millrace/kafka_jars.txt` resolves Kafka's dependencies afresh and prints new pins.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigurationError, DependencyError

if TYPE_CHECKING:
    from jgo.maven import Artifact, MavenContext

KAFKA_VERSION = "4.3.1"
_ROOTS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    # Kafka logs through slf4j 1.7 and its POM names no backend, so without this there would be no log at all.
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",
)
_PINS = Path(__file__).with_name("kafka_jars.txt")
_DOWNLOADS_AT_ONCE = 4
_REQUEST_TIMEOUT_SECONDS = 20  # of one socket read, not of a whole file

Progress = Callable[[int, int], None]


def cache_dir() -> Path:
    """Name the folder downloads are kept in, by the XDG base directory rules."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "millrace"


def missing_jars(folder: Path | None = None) -> list[str]:
    """Return the coordinates of the jars that are not in the cache yet."""
    folder = folder or cache_dir() / f"kafka-{KAFKA_VERSION}"
    return [coordinate for coordinate in _read_pins() if not (folder / _file_name(coordinate)).exists()]


def kafka_classpath(folder: Path | None = None, on_progress: Progress | None = None) -> list[Path]:
    """Return Kafka's jars, fetching those that are not in the cache yet.

    Blocks: nothing to speak of with a full cache, else as long as 46 MB take. Processes may call it at the
    same time; one fetches, the others wait. `on_progress` is called with (jars there, jars needed).

    Raises:
        DependencyError: Maven Central cannot be reached, or sends something else than what was pinned.
        ConfigurationError: The cache folder cannot be written.
    """
    folder = folder or cache_dir() / f"kafka-{KAFKA_VERSION}"
    pins = _read_pins()
    jars = {coordinate: folder / _file_name(coordinate) for coordinate in pins}
    if all(jar.exists() for jar in jars.values()):
        return list(jars.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the cache folder {folder} ({error.strerror}): set XDG_CACHE_HOME to another"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [coordinate for coordinate, jar in jars.items() if not jar.exists()]
        for remains in folder.glob("fetching-*"):  # of a process that died; we hold the lock
            shutil.rmtree(remains, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as staging:
            _fetch(
                Path(staging), {each: (jars[each], pins[each]) for each in missing}, len(pins), on_progress
            )
    return list(jars.values())


def _fetch(
    staging: Path, wanted: dict[str, tuple[Path, str]], needed: int, on_progress: Progress | None
) -> None:
    import requests  # jgo's own client; only its errors are needed here

    context = _maven(staging)

    def fetch(coordinate: str) -> None:
        target, pinned = wanted[coordinate]
        fetched = _artifact(context, coordinate).resolve()
        digest = hashlib.sha256(fetched.read_bytes()).hexdigest()
        if digest != pinned:
            raise DependencyError(
                f"{coordinate}: SHA-256 is {digest}, pinned is {pinned}; the download is damaged"
            )
        fetched.replace(target)

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        downloads = [pool.submit(fetch, coordinate) for coordinate in wanted]
        try:
            for done, download in enumerate(downloads, start=needed - len(wanted) + 1):
                download.result()
                if on_progress:
                    on_progress(done, needed)
        except (OSError, RuntimeError, requests.RequestException) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DependencyError(
                f"cannot fetch Kafka {KAFKA_VERSION} from Maven Central ({reason}): "
                f"start once with network access, or copy {staging.parent} from a machine that has it, "
                "or point MILLRACE_KAFKA_BOOTSTRAP_SERVERS at a running Kafka"
            ) from error
        finally:
            for download in downloads:  # those not begun; without this, Ctrl-C would wait for all of them
                download.cancel()


def _maven(repository: Path) -> "MavenContext":
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext, PythonResolver

    # The mirrors of jgo's own settings file (~/.config/jgo.conf) come after Central, as in jgo itself.
    remotes = {"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories}
    # The pure-Python resolver: the other one needs a Maven installation.
    return MavenContext(
        resolver=PythonResolver(),
        repo_cache=repository,
        remote_repos=remotes,
        timeout=_REQUEST_TIMEOUT_SECONDS,
    )


def _artifact(context: "MavenContext", coordinate: str) -> "Artifact":
    group, name, version = coordinate.split(":")
    return context.project(group, name).at_version(version).artifact()


def _file_name(coordinate: str) -> str:
    _, name, version = coordinate.split(":")
    return f"{name}-{version}.jar"


def _read_pins() -> dict[str, str]:
    """Read coordinate -> SHA-256."""
    rows = (line.split() for line in _PINS.read_text().splitlines() if line and not line.startswith("#"))
    return {coordinate: digest for digest, coordinate in rows}


def _resolve_pins(staging: Path) -> dict[str, str]:
    """Walk the POMs from the roots and hash every jar they need at run time."""
    from jgo.parse import Coordinate

    context = _maven(staging)
    artifacts: dict[tuple[str, str], Artifact] = {}
    for root in _ROOTS:
        # One by one: jgo applies the dependencyManagement of every root to all of them, and log4j's would
        # replace kafka-clients 4.3 by 3.9. The first root to name a jar decides its version.
        start = context.create_dependency(replace(Coordinate.parse(root), scope="compile"))
        direct, transitive = context.resolver.resolve([start])
        for each in [*direct, *(other for other in transitive if other.scope in ("compile", "runtime"))]:
            artifacts.setdefault((each.groupId, each.artifactId), each.artifact)
    return {
        f"{group}:{name}:{artifact.version}": hashlib.sha256(artifact.resolve().read_bytes()).hexdigest()
        for (group, name), artifact in artifacts.items()
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = _resolve_pins(Path(scratch))
    print(f"# The jars of Kafka {KAFKA_VERSION} (SHA-256, coordinate), written by `python -m millrace.jars`.")
    for coordinate, digest in sorted(found.items()):
        print(f"{digest}  {coordinate}")
