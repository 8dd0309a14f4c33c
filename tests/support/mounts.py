"""Files as the kubelet mounts a secret: links to a folder that is replaced whole, in one step."""

import os
import secrets
from pathlib import Path


class MountedSecret:
    """A folder whose files are links by way of `..data`, which changes them all at once."""

    def __init__(self, folder: Path, files: dict[str, str | bytes]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        for name in files:
            (folder / name).symlink_to(Path("..data") / name)
        self.replace(files)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def replace(self, files: dict[str, str | bytes]) -> None:
        """Change all files; those that are not named stay as they are."""
        data = self.folder / "..data"
        kept = {path.name: path.read_bytes() for path in data.iterdir()} if data.exists() else {}
        fresh = self.folder / f"..{secrets.token_hex(4)}"
        fresh.mkdir()
        for name, content in (kept | files).items():
            (fresh / name).write_bytes(content.encode() if isinstance(content, str) else content)
        link = self.folder / "..data_tmp"
        link.symlink_to(fresh.name)
        os.rename(link, data)
