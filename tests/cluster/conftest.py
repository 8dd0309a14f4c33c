"""One control plane for all tests of this folder, with the custom resources that Millrace needs.

Its programs take long to build, so these tests are left out unless MILLRACE_TEST_KUBE names a folder with them:
`make cluster-check` builds what is missing and sets it.
"""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane, installed

collect_ignore_glob = [] if os.environ.get("MILLRACE_TEST_KUBE") else ["test_*.py"]


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Run a control plane that knows the kinds of Strimzi, KEDA and the Prometheus Operator."""
    with installed(tmp_path_factory.mktemp("kube")) as plane:
        yield plane
