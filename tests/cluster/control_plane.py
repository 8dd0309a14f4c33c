"""A real Kubernetes control plane on loopback, without nodes: etcd, kube-apiserver and, if wanted, its controllers.

It admits, defaults, prunes and validates as any cluster does. Nothing runs the pods.
`python -m tests.cluster.control_plane` starts one with the controllers and prints its KUBECONFIG, until Ctrl-C.
"""

import base64
import contextlib
import json
import os
import secrets
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from millrace.ports import find_free
from millrace.processes import spawn
from tests.cluster import programs
from tests.support.certificates import Identity
from tests.support.eventually import eventually_sync
from tests.support.schemas import of_modules

# On two busy cores etcd and an API server with an empty database take 10 to 20 s.
_START_SECONDS = 120.0
_STOP_SECONDS = 30.0


class ControlPlane:
    """One running control plane; `kubectl` speaks to it as an administrator."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._binaries = binaries
        self._port = find_free()
        self._token = secrets.token_hex(16)
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, *, controllers: bool = False, proxy: Identity | None = None) -> None:
        """Start everything and wait until the API server is ready; as `proxy` it asks servers of further APIs."""
        client, peer = (f"http://127.0.0.1:{find_free()}" for _ in range(2))
        self._spawn(
            "etcd", "--data-dir", self.folder / "etcd", "--unsafe-no-fsync", "--log-level", "error",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}",
        )  # fmt: skip
        identity = Identity(self.folder / "keys", "kube")
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f'{self._token},admin,admin,"system:masters"\n')
        self._spawn(
            "kube-apiserver", "--etcd-servers", client, "--bind-address", "127.0.0.1",
            "--secure-port", self._port, "--tls-cert-file", identity.certificate,
            "--tls-private-key-file", identity.key, "--token-auth-file", tokens, "--authorization-mode", "RBAC",
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", identity.certificate,
            "--service-account-signing-key-file", identity.key,
            "--service-cluster-ip-range", "10.96.0.0/16", "--endpoint-reconciler-type", "none",
            *(_asking_as(proxy) if proxy else ()),
        )  # fmt: skip
        self._write_kubeconfig(identity.authority)
        self._wait(identity.authority)
        if controllers:
            self._spawn(
                "kube-controller-manager", "--kubeconfig", self.kubeconfig, "--bind-address", "127.0.0.1",
                "--secure-port", find_free(), "--cert-dir", self.folder / "controllers",
                "--leader-elect=false", "--service-account-private-key-file", identity.key,
                "--use-service-account-credentials=false",
            )  # fmt: skip

    def stop(self) -> None:
        """Stop what was started, the last first."""
        for child in reversed(self._children):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def environment(self) -> dict[str, str]:
        """Return variables with which kubectl, and what starts it, finds this cluster."""
        path = f"{self._binaries}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def try_kubectl(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl and return what became of it."""
        command = [self._binaries / "kubectl", *arguments]
        return subprocess.run(command, env=self.environment(), input=stdin, capture_output=True, text=True)

    def kubectl(self, *arguments: str | Path, stdin: str = "") -> str:
        """Run kubectl and return its output; fails the test if kubectl fails."""
        ran = self.try_kubectl(*arguments, stdin=stdin)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        """Return what `kubectl get` finds."""
        answer = json.loads(self.kubectl("get", "--output=json", *arguments))
        found: list[dict[str, Any]] = answer.get("items", [answer])
        return found

    def run(self, program: Path, *arguments: str | int | Path, **environment: str) -> None:
        """Start a program that ends with this control plane; its environment has KUBECONFIG."""
        argv = [str(each) for each in (program, *arguments)]
        log_path = self.folder / f"{program.name}.log"
        self._children.append(spawn(argv, log_path=log_path, env=self.environment() | environment))

    def _spawn(self, name: str, *arguments: str | int | Path) -> None:
        self.run(self._binaries / name, *arguments)

    def _write_kubeconfig(self, certificate: Path) -> None:
        authority = base64.b64encode(certificate.read_bytes()).decode()
        server = {"server": f"https://127.0.0.1:{self._port}", "certificate-authority-data": authority}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _wait(self, certificate: Path) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        address = f"https://127.0.0.1:{self._port}/readyz"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {self._token}"})
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for child in self._children:
                assert child.poll() is None, self._logs()
            with contextlib.suppress(OSError), urllib.request.urlopen(request, context=context, timeout=5):
                return
            time.sleep(0.2)
        raise AssertionError(self._logs())

    def _logs(self) -> str:
        tails = (path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
        return "the control plane does not start:\n" + "\n".join(tails)


def _asking_as(proxy: Identity) -> tuple[str | Path, ...]:
    return (
        "--proxy-client-cert-file", proxy.certificate, "--proxy-client-key-file", proxy.key,
        "--requestheader-client-ca-file", proxy.authority, "--requestheader-username-headers", "X-Remote-User",
        "--requestheader-group-headers", "X-Remote-Group",
        "--requestheader-extra-headers-prefix", "X-Remote-Extra-",
    )  # fmt: skip


@contextlib.contextmanager
def running(folder: Path, *, controllers: bool = False) -> Iterator[ControlPlane]:
    """Run a control plane with the programs of `tests.cluster.programs`."""
    plane = ControlPlane(folder, programs.folder())
    try:
        plane.start(controllers=controllers)
        yield plane
    finally:
        plane.stop()


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[ControlPlane]:
    """Run a control plane that knows the kinds of Strimzi, KEDA and the Prometheus Operator (MILLRACE_SCHEMAS)."""
    schemas = os.environ.get("MILLRACE_SCHEMAS")
    assert schemas, "MILLRACE_SCHEMAS must name the folder with the custom resource definitions"
    with running(folder) as plane:
        install(plane, [*sorted(Path(schemas).glob("*.yaml")), *of_modules()])
        yield plane


def install(plane: ControlPlane, definitions: Sequence[Path]) -> None:
    """Install custom resource definitions, and the runtime class that NVIDIA's GPU operator brings."""
    for path in definitions:
        plane.kubectl("apply", "--server-side", "--filename", path)
    wait = ("wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinitions", "--all")
    # kubectl gives up at once on an object that has no conditions yet.
    eventually_sync(lambda: plane.try_kubectl(*wait).returncode == 0, 60)
    runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}}
    plane.kubectl("create", "--filename=-", stdin=json.dumps(runtime | {"handler": "nvidia"}))


def main() -> None:
    """Run one until Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), controllers=True) as plane:
        if schemas := os.environ.get("MILLRACE_SCHEMAS"):
            install(plane, sorted(Path(schemas).glob("*.yaml")))
        print(f"export KUBECONFIG={plane.kubeconfig}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
