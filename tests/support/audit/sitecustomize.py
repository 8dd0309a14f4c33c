"""Python imports this first: notes in `TEST_WRITES_FILE` what the process makes, changes or removes on disk."""

import os
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
_notes = os.environ.get("TEST_WRITES_FILE")
_seen: set[str] = set()


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        is_writing = isinstance(flags, int) and bool(flags & _WRITING)
    else:
        path, is_writing = arguments[0] if arguments else None, event in _EVENTS
    if not is_writing or not isinstance(path, str | bytes | os.PathLike):
        return
    name = os.path.abspath(os.fsdecode(path))
    if name not in _seen and name != _notes:
        _seen.add(name)
        assert _notes is not None
        with open(_notes, "a") as file:
            file.write(f"{name}\n")


if _notes:
    sys.addaudithook(_note)
