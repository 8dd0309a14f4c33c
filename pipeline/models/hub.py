"""Folders of the Hugging Face hub: from the model cache, laid out by hand or by the hub's client, else downloaded.

Only configuration and weights are fetched, never code. What is in the cache is used without asking the network,
so a restart predicts as before.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline import logs
from pipeline.models import weights
from pipeline.models.specification import Specification

CONFIGURATIONS = ("config.json", "preprocessor_config.json", "processor_config.json")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")

#: Of all names of files in a repository, those that have the weights, or none.
Choose = Callable[[Sequence[str]], Sequence[str]]

_log = logs.get(__name__)


def find(
    specification: Specification, repository: str, cache: Path, choose: Choose, besides: str = ""
) -> Path:
    """Return a folder with the configuration and weights of a repository of the hub.

    `besides` is where else was looked, for the error.

    Raises:
        ConfigurationError: neither the cache nor the hub has them.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise specification.error(f"{repository!r} is not the name of a repository")
    revision = specification.options.get("revision")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise specification.error(f"{revision!r} is not a revision")
    folders = [cache / repository] if revision is None else []
    kept = cache / f"models--{repository.replace('/', '--')}"
    commit = _commit(kept, revision or "main")
    if commit is not None:
        folders.append(kept / "snapshots" / commit)
    for folder in folders:
        if _is_whole(folder, choose):
            return folder
    looked = " and ".join(filter(None, (besides, repository, kept.name)))
    looked = f"no config.json with weights in {looked} of {cache} (MILLRACE_MODEL_CACHE)"
    if weights.is_offline():
        raise specification.error(f"{looked}, and HF_HUB_OFFLINE is set")
    return _download(specification, repository, revision, cache, choose, looked)


def transformers_weights(names: Sequence[str]) -> Sequence[str]:
    """Choose what transformers would load: safetensors, whole or in parts, else the older format."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (whole := f"{stem}.{suffix}") in names:
            return [whole]
        if (index := f"{whole}.index.json") in names:
            part = re.compile(rf"{stem}-\d+-of-\d+\.{suffix}")
            return [index, *filter(part.fullmatch, names)]
    return []


def _is_whole(folder: Path, choose: Choose) -> bool:
    if not (folder / "config.json").is_file():
        return False
    chosen = choose([path.name for path in folder.iterdir()])
    for name in chosen:
        if name.endswith(".index.json"):
            parts = set(json.loads((folder / name).read_text("utf-8"))["weight_map"].values())
            if not all((folder / part).is_file() for part in parts):
                return False
    return bool(chosen)


def _commit(kept: Path, revision: str) -> str | None:
    """Return the commit of a revision that the hub's client has in its cache."""
    if (kept / "snapshots" / revision).is_dir():
        return revision
    reference = kept / "refs" / revision
    return reference.read_text("ascii").strip() if reference.is_file() else None


def _download(
    specification: Specification,
    repository: str,
    revision: str | None,
    cache: Path,
    choose: Choose,
    looked: str,
) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # they would be lines of a log
    try:
        found = HfApi().model_info(repository, revision=revision, timeout=weights.TIMEOUT_SECONDS)
    except Exception as error:  # of the hub's, of its HTTP client's, which is not the same in every version
        reason = weights.one_line(error)
        raise specification.error(f"{looked}, and none from the hub: {reason}") from None
    names = [file.rfilename for file in found.siblings or ()]
    chosen = choose(names)
    if "config.json" not in names or not chosen:
        raise specification.error(f"{looked}, and the hub's {repository} has none either")
    _log.info("downloading weights", model=specification.text, repository=repository, commit=found.sha)
    paths = []
    for name in (*filter(names.__contains__, CONFIGURATIONS), *chosen):
        try:
            paths.append(
                hf_hub_download(
                    repository,
                    name,
                    revision=found.sha,
                    cache_dir=cache,
                    etag_timeout=weights.TIMEOUT_SECONDS,
                )
            )
        except Exception as error:  # as above
            raise specification.error(f"{name} of {repository}: {weights.one_line(error)}") from None
    _remember(cache, repository, revision or "main", str(found.sha))
    return Path(paths[0]).parent


def _remember(cache: Path, repository: str, revision: str, commit: str) -> None:
    """Note which commit a revision was, as the hub's client does, for the next start."""
    reference = cache / f"models--{repository.replace('/', '--')}" / "refs" / revision
    if revision != commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, "ascii")
