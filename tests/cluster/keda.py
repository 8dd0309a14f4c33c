"""KEDA's operator and metrics API on a control plane of this machine, as processes.

MILLRACE_TEST_KEDA names a copy of KEDA's module with both programs built in it; `go install` refuses the module, as
it replaces another one:

    cp -r $(go mod download -json github.com/kedacore/keda/v2@v2.21.0 | jq -r .Dir) keda
    chmod -R u+w keda && cd keda
    go build ./cmd/operator && go build ./cmd/adapter
"""

import json
import os
from pathlib import Path

from millrace.ports import find_free
from tests.cluster.control_plane import ControlPlane
from tests.support.certificates import Identity

_METRICS_API = "v1beta1.external.metrics.k8s.io"


def folder() -> Path:
    """Name the copy of the module."""
    return Path(os.environ["MILLRACE_TEST_KEDA"])


def definitions() -> list[Path]:
    """Return the definitions of all of KEDA's kinds, without any of which the operator does not start."""
    return sorted((folder() / "config/crd/bases").glob("*.yaml"))


def start(plane: ControlPlane, proxy: Identity) -> None:
    """Start both, and let the API server send those who ask for external metrics there."""
    keys = plane.folder / "keda"
    own = Identity(keys, "keda")
    for name, source in (("tls.crt", own.certificate), ("tls.key", own.key), ("ca.crt", own.authority)):
        (keys / name).write_bytes(source.read_bytes())
    metrics_port, api_port = find_free(), find_free()
    plane.run(
        folder() / "operator", "--leader-elect=false", "--cert-dir", keys,
        "--metrics-bind-address", f"127.0.0.1:{find_free()}",
        "--health-probe-bind-address", f"127.0.0.1:{find_free()}",
        "--metrics-service-bind-address", f"127.0.0.1:{metrics_port}",
        WATCH_NAMESPACE="", KEDA_CLUSTER_OBJECT_NAMESPACE="keda", POD_NAMESPACE="keda", POD_NAME="keda",
    )  # fmt: skip
    plane.run(
        folder() / "adapter", "--lister-kubeconfig", plane.kubeconfig,
        "--authentication-kubeconfig", plane.kubeconfig, "--authorization-kubeconfig", plane.kubeconfig,
        "--authentication-skip-lookup", "--requestheader-client-ca-file", proxy.authority,
        "--bind-address", "127.0.0.1", "--secure-port", api_port, "--port", find_free(),
        "--tls-cert-file", keys / "tls.crt", "--tls-private-key-file", keys / "tls.key", "--cert-dir", keys,
        "--metrics-service-address", f"localhost:{metrics_port}",
        WATCH_NAMESPACE="",
    )  # fmt: skip
    service = {"name": "keda-metrics-apiserver", "namespace": "keda"}
    for each in (
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "keda"}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": service,
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": api_port}]},
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": _METRICS_API},
            "spec": {
                "group": "external.metrics.k8s.io",
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
                "service": service | {"port": api_port},
            },
        },
    ):
        plane.kubectl("apply", "--filename=-", stdin=json.dumps(each))
    plane.kubectl("wait", "--for=condition=Available", "--timeout=120s", f"apiservice/{_METRICS_API}")
