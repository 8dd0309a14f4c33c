"""The pinned requirements hold what pyproject.toml asks for, with hashes and without addresses."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
#: What each file of requirements/ is compiled from, as the Makefile says.
FILES = {
    "all.txt": [*EXTRAS, "dev"],
    "gateway.txt": ["gateway"],
    "steps.txt": ["steps", "database", "gpu", "cli"],
    "worker.txt": ["steps", "models", "gpu"],
}


def asked_for(extras: list[str]) -> list[Requirement]:
    texts = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        texts += PROJECT["dependency-groups"][extra] if extra == "dev" else EXTRAS[extra]
    found = [Requirement(text) for text in texts]
    inner = [name for asked in found if asked.name == "millrace" for name in asked.extras]
    return [asked for asked in found if asked.name != "millrace"] + (asked_for(inner) if inner else [])


def pinned(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text()
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", text, re.MULTILINE)
    return {canonicalize_name(package): version for package, version in pins}


@pytest.mark.parametrize("name", FILES)
def test_everything_asked_for_is_pinned(name: str) -> None:
    """Each package that pyproject.toml asks for is pinned to a version it allows (`make requirements`)."""
    versions = pinned(name)
    for asked in asked_for(FILES[name]):
        assert canonicalize_name(asked.name) in versions, asked
        assert asked.specifier.contains(versions[canonicalize_name(asked.name)], prereleases=True), asked


@pytest.mark.parametrize("name", FILES)
def test_images_get_what_was_tested(name: str) -> None:
    """Every file pins the same versions as the one the tests run with."""
    assert pinned(name).items() <= pinned("all.txt").items()


@pytest.mark.parametrize("name", [*FILES, "build.txt", "uv.txt"])
def test_pins_have_hashes_and_no_addresses(name: str) -> None:
    """Nothing can be installed but the very files that were pinned, from wherever one gets packages."""
    text = (ROOT / "requirements" / name).read_text()
    pins = re.findall(r"^[A-Za-z0-9].*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert pins
    assert all("--hash=sha256:" in pin for pin in pins)
    assert "://" not in text


def test_images_carry_only_their_own() -> None:
    """The gateway's image has no torch and no Faust, a GPU pod no database client, the others no torch."""
    assert not {"torch", "faust-streaming", "pillow", "numpy"} & pinned("gateway.txt").keys()
    assert not {"asyncpg", "fastapi"} & pinned("worker.txt").keys()
    assert not {"torch", "fastapi", "pillow"} & pinned("steps.txt").keys()
