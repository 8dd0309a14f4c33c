"""Files of models on their way through the object store: the same bytes arrive, or nothing does."""

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
