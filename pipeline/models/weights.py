"""Tensors of a model from a file, never anything else: safetensors, or a pickle that may hold only tensors.

Also what they are called (a digest over everything that changes outputs), and how they get into an architecture.
"""

import hashlib
import os
import pickle
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from pipeline import logs
from pipeline.models.specification import Specification

#: So long a server may take to answer, or to send a piece, before a start without it is reported.
TIMEOUT_SECONDS = 5.0
_CHUNK_BYTES = 1 << 20
_SHOWN_TENSORS = 3
# torchvision and torch hub name files so: the first digits of their SHA-256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")
# Of batch norm: counts batches in training, means nothing here; frozen batch norms have none.
_MEANINGLESS = "num_batches_tracked"

_log = logs.get(__name__)


def read_tensors(specification: Specification, path: Path) -> dict[str, Tensor]:
    """Read a state dict; nothing but tensors is ever unpickled.

    Raises:
        ConfigurationError: It cannot be read, or holds something else.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise specification.error(f"{path} holds more than tensors, and only tensors are unpickled") from None
    except FileNotFoundError:
        raise specification.error(f"{path} is not there") from None
    except Exception as error:  # readers raise anything about bytes that are not what they expect
        raise specification.error(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise specification.error(f"{path} is not a dictionary of tensors")
    return tensors


def read_metadata(specification: Specification, path: Path) -> dict[str, str]:
    """Return what the header of a safetensors file says beside its tensors.

    Raises:
        ConfigurationError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise specification.error(f"{path} cannot be read: {one_line(error)}") from None


def load_tensors(specification: Specification, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into an architecture; every one must find its place, and every place be filled.

    Raises:
        ConfigurationError: They do not fit; it names the first ones.
    """
    own = module.state_dict()
    wrong = {
        "missing": [name for name in own if name not in tensors and not name.endswith(_MEANINGLESS)],
        "unknown": [name for name in tensors if name not in own and not name.endswith(_MEANINGLESS)],
        "of another shape": [
            f"{name} ({', '.join(map(str, tensors[name].shape))} for {', '.join(map(str, own[name].shape))})"
            for name in own
            if name in tensors and own[name].shape != tensors[name].shape
        ],
    }
    faults = [f"{kind}: {_few(names)}" for kind, names in wrong.items() if names]
    if faults:
        raise specification.error("the tensors do not fit the architecture; " + "; ".join(faults))
    module.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name in own},
        strict=False,  # what may be missing was looked at above
    )


def digest_of(module: nn.Module, facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 over all tensors, in order of their names, and over what else changes outputs."""
    sha = hashlib.sha256()
    state = module.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    sha.update(msgspec.json.encode(facts, order="deterministic"))
    return sha.hexdigest()


def download(specification: Specification, url: str, target: Path) -> None:
    """Fetch a file into the cache, whole or not at all; its name may have the beginning of its SHA-256.

    Raises:
        OSError: nobody answers, or it cannot be written.
        ConfigurationError: It is not what its name says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    _log.info("downloading weights", model=specification.text, url=url, to=str(target))
    sha = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, partial.open("wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                sha.update(chunk)
                file.write(chunk)
        expected = _HASH_IN_NAME.search(target.name)
        if expected and not sha.hexdigest().startswith(expected[1]):
            raise specification.error(f"{url} has SHA-256 {sha.hexdigest()}, its name says {expected[1]}…")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids to download anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def one_line(error: BaseException, most: int = 300) -> str:
    """Return what an error of a library says, on one line."""
    reason: object = error
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        reason = error.reason  # what it wraps
    return " ".join(str(reason).split())[:most] or type(error).__name__


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_TENSORS} more" if len(names) > _SHOWN_TENSORS else ""
    return ", ".join(names[:_SHOWN_TENSORS]) + more
