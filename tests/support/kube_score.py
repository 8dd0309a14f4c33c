"""`make kube-score`: what kube-score has against the overlays; ends with 1 unless each finding is explained here.

kube-score is built from the Go module proxy, which takes too long for CI.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.support import manifests
from tests.support.manifests import Manifest

MODULE = "github.com/zegl/kube-score/cmd/kube-score@v1.20.0"
SECONDS = 60.0
KUBERNETES = "v1.33"
# Of kube-score's grades: all is well.
OK = 10

# A process that is throttled misses heartbeats and its group rebalances; requests share the CPU out fairly.
NO_CPU_LIMITS = "--ignore-container-cpu-limit"

#: Check, object (or every object), and why what it wants is not right here.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("container-image-pull-policy", "*"): "Images have versions: a pod that starts again needs no registry.",
    (
        "deployment-has-host-podantiaffinity",
        "*",
    ): "Topology spread constraints do it, and let pods start on one node.",
    (
        "pod-probes-identical",
        "Deployment/gateway",
    ): "See gateway.yaml: no replica leaves when all lose a dependency.",
    ("pod-probes", "StatefulSet/postgres"): "A liveness probe would end a server that recovers from a crash.",
    ("container-security-context-user-group-id", "StatefulSet/postgres"): "The image's user is 999.",
}


def findings(overlay: Path) -> Iterator[tuple[str, str, str]]:
    """Yield what kube-score has against an overlay: check, object, and its words."""
    program = manifests.install(MODULE)
    own = [each for each in manifests.render(overlay) if not is_custom(each)]
    ended = subprocess.run(
        [
            str(program),
            "score",
            NO_CPU_LIMITS,
            "--kubernetes-version",
            KUBERNETES,
            "--output-format",
            "json",
            "-",
        ],
        input=yaml.safe_dump_all(own),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if not ended.stdout.startswith("["):
        raise AssertionError(f"kube-score: {ended.stderr}")
    for scored in json.loads(ended.stdout):
        name = f"{scored['type_meta']['kind']}/{scored['object_meta']['name']}"
        for check in scored["checks"]:
            if not check["skipped"] and check["grade"] < OK:
                for comment in check["comments"] or [{"path": "", "summary": check["check"]["comment"]}]:
                    yield check["check"]["id"], name, f"{comment['path']}: {comment['summary']}"


def is_custom(manifest: Manifest) -> bool:
    """Say whether kube-score does not know an object's kind."""
    group = manifest["apiVersion"].partition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


def main() -> int:
    """Print what is not explained, and explanations that nothing needs; return 0 if there is neither."""
    used: set[tuple[str, str]] = set()
    wrong = 0
    for overlay in manifests.overlays():
        for check, name, words in findings(overlay):
            explained = {(check, name), (check, "*")} & EXCEPTIONS.keys()
            used |= explained
            if not explained:
                print(f"{overlay.name}: {name}: {check}: {words}")
                wrong += 1
    for check, name in EXCEPTIONS.keys() - used:
        print(f"nothing needs the exception of {check} for {name}")
        wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
