"""`millrace search`: images like a picture in a file, or like one that is known, through the gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from millrace.output import emit, say, show_table
from pipeline.errors import ConfigurationError, DependencyError, MillraceError
from pipeline.settings import PREFIX, Settings

if TYPE_CHECKING:
    import httpx

# The gateway's largest page.
PAGE_IMAGES = 100
# Above what the gateway itself grants a query and its search, so that its own answer is what one sees.
ANSWER_SECONDS = 60.0
_UNAVAILABLE = frozenset({502, 503, 504})


class SearchFailedError(MillraceError):
    """The gateway refused the search; the message is its reason."""

    code = "search"


async def search(
    settings: Settings,
    path: Path | None,
    image_id: str | None,
    parameters: dict[str, str],
    limit: int,
    as_json: bool,
) -> int:
    """Print up to `limit` images, nearest first; exactly one of `path` and `image_id` is given.

    Raises:
        SearchFailedError: the gateway refuses the search, or the file cannot be read.
        DependencyError: the gateway, or something it needs, does not answer.
    """
    images: list[dict[str, Any]] = []
    async with _gateway(settings) as http:
        page = await _first_page(http, path, image_id, parameters | {"limit": str(min(limit, PAGE_IMAGES))})
        images += page["images"]
        while len(images) < limit and (cursor := page.get("next_cursor")):
            size = {"limit": str(min(limit - len(images), PAGE_IMAGES))}
            page = await _ask(http, "POST", "/v1/search", params=size, json={"cursor": cursor})
            images += page["images"]
    if as_json:
        for image in images:
            emit(image)
    else:
        _show(page, images)
    return 0


async def _first_page(
    http: "httpx.AsyncClient", path: Path | None, image_id: str | None, parameters: dict[str, str]
) -> dict[str, Any]:
    if path is None:
        assert image_id is not None
        where = f"/v1/images/{quote(image_id, safe='')}/similar"
        return await _ask(http, "GET", where, params=parameters)
    try:
        data = await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        raise SearchFailedError(f"{path}: {error.strerror}") from None
    octets = {"content-type": "application/octet-stream"}
    return await _ask(http, "POST", "/v1/search", params=parameters, content=data, headers=octets)


async def _ask(http: "httpx.AsyncClient", method: str, path: str, **request: Any) -> dict[str, Any]:
    """Return the gateway's answer as it decodes."""
    import httpx

    try:
        response = await http.request(method, path, **request)
        answer = msgspec.json.decode(response.content)
    except httpx.HTTPError as error:
        raise DependencyError(f"the gateway does not answer at {http.base_url} ({error!r})") from None
    except msgspec.DecodeError:
        raise DependencyError(f"what answers at {http.base_url} is not the gateway") from None
    if response.is_success and isinstance(answer, dict) and "images" in answer:
        return answer
    detail = str(answer.get("detail", answer)) if isinstance(answer, dict) else str(answer)
    if response.status_code in _UNAVAILABLE:
        raise DependencyError(detail)
    raise SearchFailedError(detail)


@asynccontextmanager
async def _gateway(settings: Settings) -> AsyncIterator["httpx.AsyncClient"]:
    """Connect to the gateway, with the first of its API keys where this machine has their file."""
    import httpx

    headers = {}
    if settings.api_keys_file is not None:
        lines = (line.strip() for line in settings.api_keys_file.read_text("utf-8").splitlines())
        keys = [line for line in lines if line and not line.startswith("#")]
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        client = httpx.AsyncClient(
            base_url=settings.resolved_gateway, headers=headers, timeout=ANSWER_SECONDS, trust_env=False
        )
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{PREFIX}GATEWAY_URL: {error}") from None
    async with client:
        yield client


def _show(page: dict[str, Any], images: list[dict[str, Any]]) -> None:
    query = page["query"]
    how = "exactly" if page["mode"] == "exact" else "through an index"
    say(
        f"{query['model']} {query['version']}, {query['dimension']} dimensions, "
        f"deployment {query['deployment']}, searched {how}"
    )
    if not images:
        say("nothing found")
        return
    rows = [
        (
            f"{image['score']:.4f}",
            image["id"],
            ", ".join(image.get("labels", {}).values()),
            image["published_at"],
            image.get("source", ""),
        )
        for image in images
    ]
    show_table(("SCORE", "ID", "LABELS", "PUBLISHED", "SOURCE"), rows)
