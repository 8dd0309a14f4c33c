"""A program that starts the embedded services and waits to be killed, for tests of what happens then."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROGRAM = """\
import sys, time
from pathlib import Path
from millrace.kafka import EmbeddedKafka
from millrace.postgres import EmbeddedPostgres

kafka_port, controller_port, postgres_port = map(int, sys.argv[2:])
services = [
    EmbeddedKafka(Path(sys.argv[1]), kafka_port, controller_port),
    EmbeddedPostgres(Path(sys.argv[1]), postgres_port),
]
for service in services:
    service.start()
print(*(service.pid for service in services), flush=True)
time.sleep(600)
"""


@contextmanager
def stack_process(data_dir: Path, *ports: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Yield a process that has started both services, and their pids; Kafka's first."""
    command = [sys.executable, "-c", _PROGRAM, str(data_dir), *map(str, ports)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()
