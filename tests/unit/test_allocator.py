"""Memory of one batch is there for the next."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, threading
from pipeline import allocator

if sys.argv[1] == "keep":
    allocator.keep_freed()

def work():
    # As a pass does: what it makes is there together, and freed together.
    for rounds in (2, 10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            parts = [b"x" * (size << 20) for size in (20, 40, 30)]
            del parts
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
PAGES = (90 << 20) // 4096


def faults_per_round(how: str, **environment: str) -> float:
    """Return the page faults of making and freeing 90 MiB in a thread, again and again."""
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, how],
        env=plain | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="another C library")
def test_what_a_batch_needed_is_not_fetched_again() -> None:
    """Freed memory is used again without the kernel, unless somebody set malloc up who knows better."""
    assert faults_per_round("keep") < PAGES / 50
    assert faults_per_round("leave") > PAGES / 4
    assert faults_per_round("keep", MALLOC_MMAP_THRESHOLD_="1000000") > PAGES / 4
