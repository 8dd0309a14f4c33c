"""`record` without Kafka and PostgreSQL: what it does not do while they are away."""

import pytest

from agents.record import Record
from pipeline.errors import DependencyError
from pipeline.settings import load


async def test_nobody_is_silent_while_the_broker_is_away() -> None:
    """Without a broker no hour counts as one in which a GPU was silent: the database is not asked."""
    record = Record(load(kafka_bootstrap_servers="127.0.0.1:9"))
    with pytest.raises(DependencyError, match=r"127\.0\.0\.1:9"):
        await record._resolve_silent()
