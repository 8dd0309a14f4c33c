"""One upload request from its first part to its answer: each picture accepted or refused on its own.

A form's picture is published when the next one begins, so a field after it still counts and no more than one
picture is ever held. One bad picture never harms its neighbours; a broker that is gone ends the tries, not
the listing. A request with one picture is answered as an image, one with several as a batch.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec
from starlette.responses import Response

from gateway.intake import Accepted, Intake, Naming, Terms, check_given_id, id_of_key
from gateway.live import Live, Watch
from gateway.predictions import outcome, read_view, with_result
from gateway.problems import KINDS, Problem, from_error
from gateway.uploads import FILE_FIELD, Begun, Field, Held, Oversized, Part, Picture, too_large
from gateway.views import Batch, BatchItem, ImageView, JSONResponse, links
from pipeline import metrics
from pipeline.database import Database
from pipeline.errors import DependencyError, MillraceError
from pipeline.results import ImageState
from pipeline.settings import Settings


@dataclass
class Item:
    """One picture of the request and what became of it."""

    name: str | None
    accepted: Accepted | None = None
    watch: Watch | None = None
    view: ImageView | None = None
    problem: Problem | None = None

    @property
    def status(self) -> int:
        """HTTP status of this picture alone."""
        if self.problem is not None:
            return self.problem.status
        return 202 if self.view is None or self.view.state == "accepted" else 200


@dataclass(frozen=True)
class Asked:
    """What the request asks for, beside its pictures."""

    terms: Terms
    wait_seconds: int = 0
    image_id: str | None = None
    idempotency_key: str | None = None


class Upload:
    """Takes the parts of one request as they come; used once.

    Args:
        settings: limits and the deployment that is waited for.
        intake: publishes.
        live: tells results.
        database: tells results too.
        asked: the request's parameters.
        held: where the picture's bytes are counted.
        watches: keeps the interest in results until the request ends.
    """

    def __init__(
        self,
        settings: Settings,
        intake: Intake,
        live: Live,
        database: Database,
        asked: Asked,
        held: Held,
        watches: ExitStack,
    ) -> None:
        self._settings = settings
        self._intake = intake
        self._live = live
        self._database = database
        self._asked = asked
        self._held = held
        self._watches = watches
        self._image_id = asked.image_id
        self._begun = 0
        self._pending: Picture | Oversized | None = None
        self._broken: Problem | None = None
        self.items: list[Item] = []

    async def take(self, part: Part) -> None:
        """Take the next part.

        Raises:
            Problem: the form as a whole cannot be read.
        """
        if isinstance(part, Field):
            self._take_field(part)
        elif isinstance(part, Begun):
            self._begun += 1
            if self._begun > 1:
                self._refuse_id_in_batch()
                await self._accept_pending()
        else:
            self._pending = part

    async def finish(self) -> Response:
        """Accept the last picture, wait if asked to, and answer.

        Raises:
            Problem: no picture was accepted.
        """
        if self._begun == 0:
            raise Problem(
                "invalid_request",
                f"There is no picture: send it in the form field `{FILE_FIELD}`, or as the body.",
            )
        await self._accept_pending()
        await self._look()
        return self._answer_one(self.items[0]) if self._begun == 1 else self._answer_batch()

    def listed(self) -> dict[str, Any]:
        """Return what became of the pictures so far, as members of a problem document."""
        return {
            key: msgspec.to_builtins(value) for key, value in msgspec.structs.asdict(self._batch()).items()
        }

    def _take_field(self, field: Field) -> None:
        if field.name != "id":
            raise Problem(
                "invalid_request",
                f"Unknown form field `{field.name[:80]}`: a form has `file` and `id`; "
                "lane and deadline are query parameters.",
            )
        if self._image_id is not None or self._asked.idempotency_key is not None:
            raise named_twice()
        self._image_id = check_given_id(field.value)
        if self._begun > 1:
            self._refuse_id_in_batch()

    def _refuse_id_in_batch(self) -> None:
        if self._image_id is not None:
            raise Problem("invalid_request", "An id names one picture; for a batch send an Idempotency-Key.")

    async def _accept_pending(self) -> None:
        part, self._pending = self._pending, None
        assert part is not None
        item = Item(part.name)
        self.items.append(item)
        try:
            if isinstance(part, Oversized):
                raise too_large(self._settings.max_image_bytes)
            if self._broken is not None:
                raise self._broken
            await self._accept(item, part)
        except Problem as problem:
            item.problem = problem
        except MillraceError as error:
            item.problem = from_error(error)
            if isinstance(error, DependencyError):
                # Each further try would take as long to fail as this one.
                self._broken = item.problem
        finally:
            if isinstance(part, Picture):
                self._held.give_back(len(part.data))
        metrics.UPLOADS.labels(self._asked.terms.lane, str(item.status)).inc()

    async def _accept(self, item: Item, picture: Picture) -> None:
        image_id, naming = self._name()
        if self._asked.wait_seconds:
            # Before publishing: the result may be there before the broker's acknowledgement is.
            item.watch = self._watches.enter_context(self._live.watch(image_id, self._settings.deployment))
        item.accepted = accepted = await self._intake.accept(picture, self._asked.terms, image_id, naming)
        item.view = ImageView(
            id=image_id,
            state="accepted",
            links=links(image_id),
            lane=accepted.lane,
            content_type=accepted.content_type,
            size_bytes=accepted.size_bytes,
            sha256=accepted.sha256,
            expires_at=None if accepted.replayed else self._asked.terms.expires_at,
        )

    def _name(self) -> tuple[str, Naming]:
        if self._image_id is not None:
            return self._image_id, "given"
        if self._asked.idempotency_key is not None:
            return id_of_key(self._asked.idempotency_key, len(self.items) - 1), "key"
        return uuid4().hex, "made"

    async def _look(self) -> None:
        """Bring each accepted picture's view up to date: repeats at once, others as far as was asked for."""
        deadline = time.monotonic() + self._asked.wait_seconds
        for item in self.items:
            if item.view is None or item.accepted is None:
                continue
            try:
                if item.accepted.replayed:
                    item.view = await read_view(self._database, item.view.id, self._settings.deployment)
                if item.watch is not None and item.view.state == "accepted":
                    item.view = await self._wait(item.view, item.watch, deadline - time.monotonic())
            except (Problem, MillraceError):
                continue  # accepted is all that is known, and it is true
            if item.watch is not None:
                item.problem = _verdict(item.view)

    async def _wait(self, view: ImageView, watch: Watch, seconds: float) -> ImageView:
        deployment = self._settings.deployment
        result = await outcome(self._database, self._live, watch, view.id, deployment, seconds)
        if isinstance(result, ImageState):
            return await read_view(self._database, view.id, deployment)
        return view if result is None else with_result(view, result, deployment)

    def _headers(self) -> dict[str, str]:
        headers = {}
        if any(item.watch is not None for item in self.items):
            headers["Preference-Applied"] = f"wait={self._asked.wait_seconds}"
        if all(item.accepted is not None and item.accepted.replayed for item in self.items):
            headers["Idempotent-Replayed"] = "true"
        return headers

    def _answer_one(self, item: Item) -> Response:
        headers = self._headers()
        if item.view is not None:
            headers["Location"] = item.view.links.self
        if item.problem is not None:
            item.problem.headers |= headers
            raise item.problem
        assert item.view is not None
        return JSONResponse(item.view, status=item.status, headers=headers)

    def _answer_batch(self) -> Response:
        statuses = {item.status for item in self.items}
        if not any(item.accepted for item in self.items):
            status = statuses.pop() if len(statuses) == 1 else KINDS["batch_refused"][0]
            raise Problem(
                "batch_refused", "Each picture's own problem says why.", status=status, members=self.listed()
            )
        # 207 Multi-Status: the pictures fared differently, or all failed after they were accepted.
        status = max(statuses) if statuses <= {200, 202} else 207
        return JSONResponse(self._batch(), status=status, headers=self._headers())

    def _batch(self) -> Batch:
        accepted = sum(item.accepted is not None for item in self.items)
        images = tuple(
            BatchItem(
                index=index,
                status=item.status,
                file=item.name,
                image=item.view,
                problem=item.problem.document() if item.problem else None,
            )
            for index, item in enumerate(self.items)
        )
        return Batch(accepted, len(images) - accepted, images)


def named_twice() -> Problem:
    """Return the refusal of a picture with more than one name."""
    return Problem("invalid_request", "The picture is named twice: send one id or one Idempotency-Key.")


def _verdict(view: ImageView) -> Problem | None:
    """Return the problem of a picture that was accepted and that a worker then could not finish."""
    if view.state != "dead_lettered" or view.failure is None:
        return None
    code = view.failure.code if view.failure.code in KINDS else "internal"
    known = {"id": view.id, "state": view.state, "links": msgspec.to_builtins(view.links)}
    return Problem(code, view.failure.reason, members=known)
