"""The manifests under k8s/strimzi: they render, and what they say agrees with the code."""

from pathlib import Path

import pytest

from tests.support import manifests


@pytest.mark.parametrize("overlay", manifests.overlays(), ids=lambda path: path.name)
def test_every_overlay_renders(overlay: Path) -> None:
    """`kubectl apply -k` gets objects from every overlay."""
    assert manifests.render(overlay)
