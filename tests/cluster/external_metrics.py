"""The external metrics API as KEDA's adapter serves it, behind a real API server's aggregation layer.

Stands in for the adapter where the question is what `millrace k8s doctor` makes of its answers.
"""

import contextlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.cluster.control_plane import ControlPlane
from tests.cluster.sound import create
from tests.support.certificates import Identity

GROUP = "external.metrics.k8s.io"
_VERSION = {"groupVersion": f"{GROUP}/v1beta1", "version": "v1beta1"}
_ANSWERS: dict[str, dict[str, object]] = {
    "": {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": GROUP,
        "versions": [_VERSION],
        "preferredVersion": _VERSION,
    },
    "/v1beta1": {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{GROUP}/v1beta1",
        "resources": [],
    },
}


class Adapter:
    """Answers each metric with `values`, by its name; one that is not there with an error, as KEDA's does."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.broken: set[str] = set()

    def answer(self, path: str) -> tuple[int, dict[str, object]]:
        """Return status and body."""
        path = path.partition("?")[0].removeprefix(f"/apis/{GROUP}")
        if path in _ANSWERS:
            return 200, _ANSWERS[path]
        match = re.fullmatch(r"/v1beta1/namespaces/([^/]+)/([^/]+)", path)
        if match is None:
            return 404, {"kind": "Status", "status": "Failure", "message": "not found", "code": 404}
        if match[2] in self.broken:
            said = "unable to get external metric: no matching metrics found"
            return 500, {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": said,
                "code": 500,
            }
        item: dict[str, object] = {
            "metricName": match[2],
            "metricLabels": {},
            "timestamp": "2026-01-01T00:00:00Z",
            "value": self.value,
        }
        return 200, {
            "kind": "ExternalMetricValueList",
            "apiVersion": f"{GROUP}/v1beta1",
            "metadata": {},
            "items": [item],
        }


@contextlib.contextmanager
def serving(plane: ControlPlane, folder: Path) -> Iterator[Adapter]:
    """Serve the API on loopback and register it."""
    adapter = Adapter("7")
    identity = Identity(folder, "adapter")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = adapter.answer(self.path)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    plane.try_kubectl("create", "namespace", "keda")
    service = {"type": "ExternalName", "externalName": "localhost"}
    create(
        plane,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "adapter", "namespace": "keda"},
            "spec": service,
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"v1beta1.{GROUP}"},
            "spec": {
                "group": GROUP,
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
                "service": {"name": "adapter", "namespace": "keda", "port": server.server_port},
            },
        },
    )
    try:
        plane.kubectl("wait", "--for=condition=Available", "--timeout=60s", f"apiservice/v1beta1.{GROUP}")
        yield adapter
    finally:
        plane.kubectl("delete", "apiservice", f"v1beta1.{GROUP}")
        server.shutdown()
        server.server_close()
        thread.join()
