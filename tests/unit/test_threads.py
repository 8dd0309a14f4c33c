import os
import subprocess
import sys


def test_waiting_openmp_threads_sleep() -> None:
    """What imports Millrace's parts before torch has OpenMP threads that sleep while they wait."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    # Twice: unset, and set by somebody who knows better.
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        code = "import os, pipeline.errors; print(os.environ['OMP_WAIT_POLICY'])"
        told = environment if given is None else environment | {"OMP_WAIT_POLICY": given}
        done = subprocess.run(
            [sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
