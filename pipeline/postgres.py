"""Reaching PostgreSQL: the pool, errors sorted into ours, named queries, migrations.

Every statement runs in an explicit transaction, without named prepared statements, so that PgBouncer may
stand in between in any of its modes. Nothing here knows a table.
"""

import asyncio
import contextlib
import functools
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg

from pipeline import rotation
from pipeline.errors import ConfigurationError, DependencyError, MillraceError, StorageRefusedError
from pipeline.rotation import Rotated
from pipeline.settings import PREFIX, Settings

CONNECT_SECONDS = 10.0
# A server that vanished without a word is noticed by this. A batch of 16 MiB takes well under a second; on a
# disk a hundred times slower it still fits.
STATEMENT_SECONDS = 60.0
_URL_SETTING = f"{PREFIX}DATABASE_URL"
# SQLSTATE classes that blame the data: data exception, integrity constraint, program limit (a vector or an
# index entry too long). Everything else may pass: with time, a failover, a migration, more room.
_REFUSED_CLASSES = frozenset({"22", "23", "54"})
# Wrong user, password or database name: no use in trying again at start.
_MISCONFIGURED = frozenset({"28000", "28P01", "3D000"})
# What a URL may name of files; each is a mount of a secret, or nothing.
_FILES = frozenset({"sslrootcert", "sslcert", "sslkey"})
# "millrace" in ASCII; advisory locks are named by a number.
_MIGRATION_LOCK = 0x6D696C6C72616365

Connection = asyncpg.pool.PoolConnectionProxy


def _read_queries() -> dict[str, str]:
    """Read `queries/*.sql`: each query follows `-- name: NAME` and a line that says what it is for."""
    queries: dict[str, str] = {}
    for file in sorted(resources.files("pipeline").joinpath("queries").iterdir(), key=lambda file: file.name):
        for part in re.split(r"^-- name: ", file.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            name, _, text = part.partition("\n")
            if name in queries or not text.startswith("-- "):
                raise AssertionError(
                    f"{file.name}: query {name!r} is there twice or does not say what it is for"
                )
            queries[name] = text.strip()
    return queries


QUERIES = _read_queries()


@contextlib.contextmanager
def sorted_errors() -> Iterator[None]:
    """Raise what asyncpg raises as one of our errors.

    Raises:
        StorageRefusedError: the data is at fault.
        DependencyError: anything else; trying again is safe, as every write is idempotent.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        raise _sorted(error) from error
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError) as error:
        raise DependencyError(f"PostgreSQL: {error or type(error).__name__}") from error


def _is_misconfigured(error: DependencyError) -> bool:
    """Whether it is the URL or what it names that is wrong, so that trying again at start is no use."""
    cause = error.__cause__
    if isinstance(cause, asyncpg.PostgresError):
        return cause.sqlstate in _MISCONFIGURED
    return isinstance(cause, asyncpg.exceptions.ClientConfigurationError)


def _look_for_files(dsn: str) -> None:
    """See that files of the URL are there; later, while they are replaced, they may be missing for a moment.

    Raises:
        ConfigurationError: one is not. asyncpg would not say which.
    """
    for name, value in parse_qsl(urlsplit(dsn).query):
        if name in _FILES and not Path(value).is_file():
            raise ConfigurationError(f"{_URL_SETTING}: {name}={value}: there is no such file")


def _sorted(error: asyncpg.PostgresError) -> MillraceError:
    state = error.sqlstate or ""
    # Never the detail: it quotes the row.
    text = f"PostgreSQL {state}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if state[:2] in _REFUSED_CLASSES:
        return StorageRefusedError(text.replace("\x00", "\\0"))
    return DependencyError(text)


@functools.cache
def _password(path: Path) -> Rotated[str]:
    return rotation.password(f"{PREFIX}DATABASE_PASSWORD_FILE", path)


async def connect(dsn: str, password_file: Path | None = None, **options: Any) -> asyncpg.Connection:
    """Connect as asyncpg does, with the password that the file has now; a refused new one by the former.

    What else the URL names (`passfile`, `sslrootcert`, …) asyncpg reads again each time.

    Raises:
        ConfigurationError: the file cannot be used, and never could in this process.
        asyncpg.PostgresError, OSError: as asyncpg does.
    """

    async def connect_by(password: str | None) -> asyncpg.Connection:
        return await asyncpg.connect(dsn, password=password, **options)

    if password_file is None:
        return await connect_by(None)
    return await _password(password_file).attempt(connect_by, asyncpg.InvalidPasswordError)


class Pool:
    """Connections to one database, made when they are needed and again when they are lost."""

    def __init__(self, pool: asyncpg.Pool, blame: str) -> None:
        """Take a pool, and what to say when the server refuses the user, password or name of the database."""
        self._pool = pool
        self._blame = blame

    @classmethod
    async def open(cls, settings: Settings) -> "Pool":
        """Prepare a pool without connecting.

        Raises:
            ConfigurationError: the URL or the file with the password cannot be read.
        """
        if settings.database_password_file is not None:
            _password(settings.database_password_file)
        _look_for_files(settings.resolved_database)
        try:
            pool = await asyncpg.create_pool(
                settings.resolved_database,
                min_size=0,
                max_size=settings.database_pool_size,
                timeout=CONNECT_SECONDS,
                command_timeout=STATEMENT_SECONDS,
                # PgBouncer in transaction mode gives the next transaction another server, which does not know
                # the statement. Parsing again costs 0.1 ms against a batch of hundreds of rows.
                statement_cache_size=0,
                server_settings={"application_name": "millrace"},
                connect=functools.partial(connect, password_file=settings.database_password_file),
            )
        except (ValueError, asyncpg.InterfaceError, OSError) as error:
            raise ConfigurationError(f"{_URL_SETTING}: {error}") from None
        blame = _URL_SETTING
        if settings.database_password_file is not None:
            blame = f"{_URL_SETTING}, {PREFIX}DATABASE_PASSWORD_FILE"
        if settings.database_url is None:
            blame = (
                f"{PREFIX}DATA_DIR: the PostgreSQL on port {settings.postgres_port} is not that of "
                f"{settings.data_dir.absolute()}: run this where `millrace up` runs, or name its data folder"
            )
        return cls(pool, blame)

    async def close(self) -> None:
        """Close all connections, at once if they do not close in time."""
        try:
            await asyncio.wait_for(self._pool.close(), CONNECT_SECONDS)
        except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            self._pool.terminate()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Commit at the end, roll back on any error; errors come out as `sorted_errors` says."""
        with sorted_errors():
            async with self._pool.acquire(timeout=STATEMENT_SECONDS) as connection:
                transaction = connection.transaction()
                await transaction.start()
                try:
                    yield connection
                except asyncpg.ReadOnlySQLTransactionError:
                    # After a failover the old primary may live on as a replica, and its connections with it.
                    await self._pool.expire_connections()
                    raise
                except BaseException:
                    # On a lost connection rolling back fails too, and would hide why.
                    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                        await transaction.rollback()
                    raise
                await transaction.commit()

    async def rows(self, name: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run one named query in a transaction of its own."""
        async with self.transaction() as connection:
            return await connection.fetch(QUERIES[name], *arguments)

    async def check(self) -> None:
        """See that the server can be used and is migrated.

        Raises:
            ConfigurationError: it refuses the user, the password or the name of the database.
            DependencyError: it does not answer, or not all migrations were applied yet.
        """
        try:
            applied = await self._applied()
        except DependencyError as error:
            if _is_misconfigured(error):
                raise ConfigurationError(f"{self._blame}: {error.__cause__}") from None
            raise
        if pending := [name for name, _, _ in _migrations() if name not in applied]:
            raise DependencyError(
                f"PostgreSQL lacks migrations, run `millrace migrate`: {', '.join(pending)}"
            )

    async def _applied(self) -> set[str]:
        async with self.transaction() as connection:
            if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
                return set()
            return {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}


async def migrate(dsn: str, password_file: Path | None = None) -> list[str]:
    """Apply the migrations that were not applied yet and return their names.

    Each file is one transaction. Safe to run from several processes at once and over and over. A database
    that is ahead of this code is left as it is.

    Raises:
        ConfigurationError: a file of the URL is missing, the database refuses the user, an applied migration was
            changed since, or one cannot be applied (such as a missing pgvector).
        DependencyError: the database does not answer.
    """
    _look_for_files(dsn)
    try:
        with sorted_errors():
            connection = await connect(dsn, password_file, timeout=CONNECT_SECONDS, statement_cache_size=0)
    except DependencyError as error:
        if _is_misconfigured(error):
            raise ConfigurationError(f"{_URL_SETTING}: {error.__cause__}") from None
        raise
    try:
        return [name for name, text, digest in _migrations() if await _apply(connection, name, text, digest)]
    finally:
        await connection.close(timeout=CONNECT_SECONDS)


def _migrations() -> list[tuple[str, str, str]]:
    """Return (name, text, SHA-256) of every migration in order."""
    folder = resources.files("pipeline").joinpath("migrations")
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name
    )
    return [
        (
            file.name.removesuffix(".sql"),
            file.read_text("utf-8"),
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in files
    ]


async def _apply(connection: asyncpg.Connection, name: str, text: str, digest: str) -> bool:
    """Apply one migration unless it is there; return whether it was applied now."""
    with sorted_errors():
        async with connection.transaction():
            # Held to the end of this transaction: another process waits here, then finds the row.
            await connection.fetch("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations "
                "(name text PRIMARY KEY, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            applied = await connection.fetchval("SELECT sha256 FROM schema_migrations WHERE name = $1", name)
            if applied is not None and applied != digest:
                raise ConfigurationError(
                    f"migration {name} was changed after it was applied here: restore it and add another"
                )
            if applied is None:
                try:
                    await connection.execute(text)
                except (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError,
                        asyncpg.UndefinedFileError, asyncpg.SyntaxOrAccessError) as error:  # fmt: skip
                    raise ConfigurationError(f"migration {name} cannot be applied: {error}") from error
                await connection.execute(
                    "INSERT INTO schema_migrations (name, sha256) VALUES ($1, $2)", name, digest
                )
    return applied is None
