"""etcd, kube-apiserver, kube-controller-manager, kubectl and kustomize, built once from the Go module proxy.

No release is downloaded: the module in `servers/` names the versions and `go.sum` their hashes. The first
build takes 20 minutes on two busy cores; what it made is kept, and one that was broken off goes on where it was.
`python -m tests.cluster.programs` builds and prints the folder.
"""

import os
import subprocess
import sys
from pathlib import Path

from millrace.jars import cache_dir
from tests.support import manifests

KUBERNETES_VERSION = "1.36.3"
_MODULE = Path(__file__).with_name("servers")
_PACKAGES = {
    "etcd": "./etcd",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kustomize": "sigs.k8s.io/kustomize/kustomize/v5",
}


def folder() -> Path:
    """Name the folder with the programs: MILLRACE_TEST_KUBE, else one in the cache."""
    named = os.environ.get("MILLRACE_TEST_KUBE")
    return Path(named) if named else cache_dir() / f"kube-{KUBERNETES_VERSION}"


def build() -> Path:
    """Build what is missing, at low priority; return the folder."""
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    major, minor, _ = KUBERNETES_VERSION.split(".")
    stamps = {"gitVersion": f"v{KUBERNETES_VERSION}", "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamps.items())
    for name, package in _PACKAGES.items():
        if (target / name).exists():
            continue
        print(f"building {name}", file=sys.stderr, flush=True)
        part = target / f"{name}.part"
        subprocess.run(
            [
                "nice",
                "-n",
                "19",
                manifests.go(),
                "build",
                "-trimpath",
                "-ldflags",
                f"-s -w {flags}",
                "-o",
                part,
                package,
            ],
            cwd=_MODULE,
            env=os.environ | {"CGO_ENABLED": "0"},
            check=True,
        )
        part.rename(target / name)  # whole or not at all
    return target


if __name__ == "__main__":
    print(build())
