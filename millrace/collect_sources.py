"""Where `millrace collect` reads GPUs: this machine's NVML, or a dcgm-exporter.

Neither blocks the event loop. What is not there at the start is an error; what goes away later is waited for.
"""

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import httpx

from pipeline import exporter, logs
from pipeline.errors import ContractError, DependencyError
from pipeline.telemetry import Gpu, Sample, Why

# A page of 16 GPUs has 0.1 MB; MIG and many labels make it ten times as large.
MAX_PAGE_BYTES = 32 * 1024 * 1024
SCRAPE_SECONDS = 10.0
# A driver that has not returned by then is stuck; the thread in it does not keep the process.
_CLOSE_SECONDS = 2.0

#: GPU UUID, code, moment; called on the event loop.
OnXid = Callable[[str, int, datetime], None]
T = TypeVar("T")

_log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """The GPUs of one host at one moment."""

    host: str
    samples: list[Sample]
    gpus: tuple[Gpu, ...]
    #: GPUs that have not answered once: nobody knows their UUID.
    nameless: int = 0


class Source(Protocol):
    """Reads GPUs."""

    #: `Samples.source`.
    name: str

    async def start(self, on_xid: OnXid) -> None:
        """Begin.

        Raises:
            DependencyError: there is nothing to read.
        """
        ...

    async def read(self) -> list[Reading]:
        """Return a sample of every GPU.

        Raises:
            DependencyError: not now.
        """
        ...

    async def stop(self) -> None:
        """End."""
        ...


class NvmlSource:
    """This machine's GPUs; NVML's calls run in a thread of their own, one after another."""

    name = "nvml"

    def __init__(self, host: str) -> None:
        from pipeline.nvml import Nvml

        self._host = host
        self._thread = _Thread()
        self._loop = asyncio.get_running_loop()
        self._on_xid: OnXid | None = None
        self._nvml = Nvml(self._xid_happened)

    async def start(self, on_xid: OnXid) -> None:
        """Open NVML."""
        self._on_xid = on_xid
        await self._thread.call(self._nvml.open)

    async def read(self) -> list[Reading]:
        """Read every GPU; takes as long as the driver does."""
        samples = await self._thread.call(lambda: self._nvml.sample(datetime.now(UTC)))
        return [Reading(self._host, samples, self._nvml.gpus, self._nvml.nameless)]

    async def stop(self) -> None:
        """Close NVML, unless the driver is stuck."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._thread.call(self._nvml.close), _CLOSE_SECONDS)

    def _xid_happened(self, uuid: str, code: int) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._tell, uuid, code, datetime.now(UTC))

    def _tell(self, uuid: str, code: int, moment: datetime) -> None:
        if self._on_xid is not None:
            self._on_xid(uuid, code, moment)


class ExporterSource:
    """What a dcgm-exporter shows; `host` overrides what its series say."""

    name = "dcgm-exporter"

    def __init__(
        self,
        url: str,
        host: str | None,
        count_dropped: Callable[["Counter[Why]"], None] = lambda reasons: None,
    ) -> None:
        parts = urlsplit(url)
        user, _, address = parts.netloc.rpartition("@")
        # Without the password: it is in every message.
        self._url = parts._replace(netloc=address).geturl()
        self._host = host
        self._fallback_host = host or parts.hostname or "unknown"
        self._count_dropped = count_dropped
        self._xids: exporter.XidCounts | None = None
        self._client = httpx.AsyncClient(
            timeout=SCRAPE_SECONDS,
            follow_redirects=True,
            auth=(unquote(parts.username or ""), unquote(parts.password or "")) if user else None,
        )

    async def start(self, on_xid: OnXid) -> None:
        """Look whether it answers and shows GPUs."""
        if not await self.read():
            raise DependencyError(f"{self._url} answers, but no metric there names a GPU by its UUID")

    async def read(self) -> list[Reading]:
        """Scrape once."""
        page = await self._page()
        moment = datetime.now(UTC)
        try:
            scraped, self._xids, dropped = await asyncio.to_thread(
                exporter.parse, page, moment, self._fallback_host, self._xids
            )
        except ContractError as error:
            raise DependencyError(f"{self._url} answers with what is {error.message}") from None
        self._count_dropped(dropped)
        return [Reading(self._host or one.host, one.samples, tuple(one.gpus)) for one in scraped]

    async def stop(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def _page(self) -> str:
        page = bytearray()
        try:
            async with self._client.stream("GET", self._url) as response:
                if response.status_code != 200:
                    raise DependencyError(f"{self._url} answers with status {response.status_code}")
                async for chunk in response.aiter_bytes():
                    page += chunk
                    if len(page) > MAX_PAGE_BYTES:
                        raise DependencyError(f"{self._url} answers with more than {MAX_PAGE_BYTES:,} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DependencyError(
                f"{self._url} does not answer ({str(error) or type(error).__name__})"
            ) from None
        return page.decode("utf-8", "replace")


class _Thread:
    """Runs calls one after another in a thread that does not keep the process alive: a driver may be stuck."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="nvml", daemon=True).start()

    async def call(self, function: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:  # handed to the caller
                _tell(loop, future, None, error)
            else:
                _tell(loop, future, result, None)

        self._calls.put(run)
        return await future

    def _run(self) -> None:
        while True:
            self._calls.get()()


def _tell(
    loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]", result: Any, error: BaseException | None
) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle)
