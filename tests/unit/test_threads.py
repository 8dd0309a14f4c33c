import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "PASSIVE"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")]
)
def test_what_imports_millrace_before_torch_has_it_told(name: str, value: str) -> None:
    """OpenMP threads sleep while they wait, and oneDNN keeps its code for every size of a batch."""
    environment = {key: value for key, value in os.environ.items() if key != name}
    # Twice: unset, and set by somebody who knows better.
    for given, expected in ((None, value), ("other", "other")):
        code = f"import os, pipeline.errors; print(os.environ[{name!r}])"
        told = environment if given is None else environment | {name: given}
        done = subprocess.run(
            [sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
