"""HNSW indexes on embeddings: one per model version and dimension, built when there are enough vectors.

Safe from several processes at once and when killed anywhere: one of them works at a time, and what a broken
build left behind is dropped by the next round. Reading and writing go on meanwhile.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from pipeline import logs
from pipeline.postgres import CONNECT_SECONDS, QUERIES, connect, sorted_errors
from pipeline.vectors import Space

# "hnswmake" in ASCII; advisory locks are named by a number.
_MAINTENANCE_LOCK = 0x686E73776D616B65
# An autovacuum gives way to whoever waits for its lock within a second; a build that goes on does not.
_LOCK_TIMEOUT = "2s"

log = logs.get(__name__)


async def maintain(dsn: str, min_rows: int, password_file: Path | None = None) -> list[str]:
    """Drop what broken builds left, drop indexes without vectors, build those that are missing.

    Returns the names of the indexes it built; none when another process is at it. Takes as long as building
    does: minutes for millions.

    Raises:
        DependencyError: the database does not answer, or does not let us; the next round goes on.
    """
    with sorted_errors():
        async with _connected(dsn, password_file) as guard, guard.transaction():
            if not await _is_alone(guard):
                return []
            # Another one, in autocommit: such a build cannot be in a transaction.
            async with _connected(dsn, password_file) as connection:
                return await _maintain(connection, min_rows)


async def _is_alone(guard: asyncpg.Connection) -> bool:
    """Take the lock of maintenance for the guard's transaction; False when another process has it.

    Two builds at once would end in a deadlock, and the one that is nearly done would lose. The lock is not the
    session's, for PgBouncer's sake. One simple query without parameters: what the extended protocol leaves open
    in a transaction keeps its snapshot, and the build would wait for that for ever.
    """
    try:
        await guard.execute(f"SET LOCAL lock_timeout = 1; SELECT pg_advisory_xact_lock({_MAINTENANCE_LOCK})")
    except asyncpg.LockNotAvailableError:
        return False
    return True


@asynccontextmanager
async def _connected(dsn: str, password_file: Path | None) -> AsyncIterator[asyncpg.Connection]:
    """Connect, without a command timeout: a build takes as long as it takes."""
    connection = await connect(dsn, password_file, timeout=CONNECT_SECONDS, statement_cache_size=0)
    try:
        yield connection
    except BaseException:
        connection.terminate()  # a server that does not answer would keep a stopping process waiting
        raise
    await connection.close(timeout=CONNECT_SECONDS)


async def _maintain(connection: asyncpg.Connection, min_rows: int) -> list[str]:
    if not all((await _present(connection)).values()):
        await _drop_broken(connection)
    spaces = {space.index_name: space for space in await _spaces(connection)}
    present = await _present(connection)
    for name, is_valid in present.items():
        if is_valid and name not in spaces:
            log.info("dropping an index without vectors", index=name)
            await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {_quoted(name)}")
    built = []
    for name, space in spaces.items():
        if name not in present and await _is_worth_it(connection, space, min_rows):
            log.info("building an index", index=name, model=space.model, version=space.version)
            if await _build(connection, space):
                built.append(name)
    return built


async def _build(connection: asyncpg.Connection, space: Space) -> bool:
    """Build the index of a space; False when somebody came in between."""
    row = await connection.fetchrow(
        QUERIES["index_statements"], space.index_name, space.index_type,
        space.model, space.version, space.dimension,
    )  # fmt: skip
    assert row is not None
    try:
        await connection.execute(row["make"])
        await connection.execute(row["label"])
    except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError, asyncpg.UndefinedTableError):
        return False  # somebody made one of that name at the same moment, or dropped it since
    return (await _present(connection)).get(space.index_name, False)


async def _drop_broken(connection: asyncpg.Connection) -> None:
    """Drop indexes that no build will finish any more.

    A build that lost its guard, or a person's, holds this lock to its end, also between its transactions: with
    the lock in hand an invalid index is nobody's. Neither reading nor writing waits for the lock; the drop
    itself is quick.
    """
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
            await connection.execute("LOCK TABLE embeddings IN SHARE UPDATE EXCLUSIVE MODE")
            for name, is_valid in (await _present(connection)).items():
                if not is_valid:
                    log.warning("dropping an index whose build was broken off", index=name)
                    await connection.execute(f"DROP INDEX IF EXISTS {_quoted(name)}")
    except asyncpg.LockNotAvailableError:
        log.info("an index is being built, or its table is busy")


async def _is_worth_it(connection: asyncpg.Connection, space: Space, min_rows: int) -> bool:
    if space.index_type is None:
        return False
    count: int = await connection.fetchval(
        QUERIES["vector_count"], space.model, space.version, space.dimension, min_rows
    )
    return count >= min_rows


async def _spaces(connection: asyncpg.Connection) -> list[Space]:
    return [Space(**row) for row in await connection.fetch(QUERIES["spaces"])]


async def _present(connection: asyncpg.Connection) -> dict[str, bool]:
    """Return our indexes by name, and whether each is valid: built whole."""
    return {row["name"]: row["is_valid"] for row in await connection.fetch(QUERIES["vector_indexes"])}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
