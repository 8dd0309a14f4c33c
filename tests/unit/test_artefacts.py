"""Files of models on their way through the object store: the same bytes arrive, or nothing does."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline import artefacts
from pipeline.deployments import Artefact
from pipeline.errors import ConfigurationError, MissingImageError
from pipeline.objects import ObjectStore
from pipeline.settings import load

SPECIFICATION = "file:{}/otters.safetensors#torchvision:resnet18?a=b"


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore.open(load(object_store_url=str(tmp_path / "objects")))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "training"
    folder.mkdir()
    (folder / "otters.safetensors").write_bytes(b"w" * 5_000_000)
    (folder / "otters.safetensors.json").write_text('["otter"]')
    (folder / "other.json").write_text("none of its files")
    return folder


async def test_a_file_arrives_with_what_belongs_to_it(
    tmp_path: Path, objects: ObjectStore, weights: Path
) -> None:
    """Weights and the card beside them are in the cache as they were, and fetched only once."""
    names, files = await artefacts.upload(objects, [SPECIFICATION.format(weights), "builtin:quality"])
    assert names == ["file:otters.safetensors#torchvision:resnet18?a=b", "builtin:quality"]
    assert [file.name for file in files] == ["otters.safetensors", "otters.safetensors.json"]
    folder = await artefacts.fetch(objects, files, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: (weights / name).read_bytes() for name in ("otters.safetensors", "otters.safetensors.json")
    }
    await objects.delete([artefacts.object_key(file) for file in files])
    assert await artefacts.fetch(objects, files, tmp_path / "cache") == folder


async def test_another_set_of_files_is_another_folder(
    tmp_path: Path, objects: ObjectStore, weights: Path
) -> None:
    """New labels for the same weights are another version: neither takes the other's files."""
    _, before = await artefacts.upload(objects, [SPECIFICATION.format(weights)])
    (weights / "otters.safetensors.json").write_text('["badger"]')
    _, after = await artefacts.upload(objects, [SPECIFICATION.format(weights)])
    folders = [await artefacts.fetch(objects, files, tmp_path / "cache") for files in (before, after)]
    assert [(folder / "otters.safetensors.json").read_text() for folder in folders] == [
        '["otter"]',
        '["badger"]',
    ]


async def test_a_damaged_file_is_fetched_again(tmp_path: Path, objects: ObjectStore, weights: Path) -> None:
    """What lies in the cache is used only if it has the digest."""
    _, files = await artefacts.upload(objects, [SPECIFICATION.format(weights)])
    folder = await artefacts.fetch(objects, files, tmp_path / "cache")
    (folder / "otters.safetensors").write_bytes(b"x" * 5_000_000)
    await artefacts.fetch(objects, files, tmp_path / "cache")
    assert (folder / "otters.safetensors").read_bytes() == b"w" * 5_000_000


async def test_another_object_is_never_used(tmp_path: Path, objects: ObjectStore) -> None:
    """An object with other bytes than were activated is refused and leaves nothing in the cache."""
    file = Artefact("otters.safetensors", "0" * 64, 4)
    with pytest.raises(MissingImageError):
        await artefacts.fetch(objects, [file], tmp_path / "cache")
    await objects.put(artefacts.object_key(file), b"evil")
    with pytest.raises(ConfigurationError, match="digest differs"):
        await artefacts.fetch(objects, [file], tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


async def test_a_file_that_is_not_here_is_said(tmp_path: Path, objects: ObjectStore) -> None:
    """A path that this machine does not have is a clear error, and so are two files of one name."""
    with pytest.raises(ConfigurationError, match="no such file on this machine"):
        await artefacts.upload(objects, [SPECIFICATION.format(tmp_path)])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "otters.safetensors").write_text(name)
    with pytest.raises(ConfigurationError, match="two different files"):
        await artefacts.upload(objects, [SPECIFICATION.format(tmp_path / name) for name in ("a", "b")])


async def test_only_old_files_that_no_version_names_are_deleted(
    tmp_path: Path, objects: ObjectStore, weights: Path
) -> None:
    """What a version names, what is new, what is uploaded meanwhile and what others keep there stays."""
    stored = {}
    for number, name in enumerate(("named", "unused", "new", "uploaded again")):
        path = tmp_path / f"{name.partition(' ')[0]}.safetensors"
        path.write_bytes(bytes([number]))
        _, (stored[name],) = await artefacts.upload(
            objects, [SPECIFICATION.replace("{}/otters.safetensors", str(path))]
        )
        if name != "new":
            make_old(tmp_path / "objects" / artefacts.object_key(stored[name]))
    foreign = "models/somebody-elses/weights.safetensors"
    await objects.put(foreign, b"w")
    make_old(tmp_path / "objects" / foreign)

    async def used() -> list[Artefact]:
        await objects.put(artefacts.object_key(stored["uploaded again"]), bytes([3]))
        return [stored["named"]]

    assert await artefacts.remove_unused(objects, datetime.now(UTC), used) == 1
    left = {item.key async for page in objects.list("models") for item in page}
    kept = (stored["named"], stored["new"], stored["uploaded again"])
    assert left == {foreign} | {artefacts.object_key(file) for file in kept}


def make_old(path: Path) -> None:
    old = (datetime.now(UTC) - timedelta(days=100)).timestamp()
    os.utime(path, (old, old))
