"""What the API returns: one struct per document, the links between them, and their OpenAPI schemas.

The wire names are these fields; additions are compatible, renames are not. Nothing here does I/O.
"""

from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from starlette.responses import Response

from pipeline.events import ModelResult, Receipt
from pipeline.results import State as State
from pipeline.vectors import Mode

_encoder = msgspec.json.Encoder()
_described: set[type] = set()


class Links(msgspec.Struct, frozen=True):
    """Paths of an image's resources; the id in them is percent-encoded."""

    self: str
    content: str
    predictions: str


class Failure(msgspec.Struct, frozen=True):
    """Why there are no predictions: a stable code, and the reason for a person."""

    code: str
    reason: str


class DeploymentState(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one deployment of models is with the image."""

    state: State
    failure: Failure | None = None


class PredictionView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one deployment said about the image."""

    id: str
    deployment: str
    outcome: Literal["predicted", "expired"]
    time: datetime
    receipt: Receipt
    models: tuple[ModelResult, ...] = ()
    #: Of the deployment's models; absent for those that the setting names.
    revision: int = 0
    reason: str | None = None


class ImageView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An image: its state in the default deployment, and what is known of it."""

    id: str
    state: State
    links: Links
    failure: Failure | None = None
    lane: str | None = None
    content_type: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    published_at: datetime | None = None
    expires_at: datetime | None = None
    #: State per deployment that has said anything.
    deployments: dict[str, DeploymentState] = {}
    predictions: tuple[PredictionView, ...] = ()


class Predictions(msgspec.Struct, frozen=True):
    """The predictions of one image, oldest first."""

    id: str
    predictions: tuple[PredictionView, ...]


class BatchItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one picture of a batch: an image, or a problem."""

    #: Place in the request, from 0.
    index: int
    status: int
    #: The client's own name of the file.
    file: str | None = None
    image: ImageView | None = None
    problem: dict[str, Any] | None = None


class Batch(msgspec.Struct, frozen=True):
    """What became of each picture of a batch, in the order of the request."""

    accepted: int
    refused: int
    images: tuple[BatchItem, ...]


class SearchedWith(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was searched with: an embedding of this version of this model, in this deployment."""

    deployment: str
    model: str
    version: str
    dimension: int
    #: None for an uploaded picture.
    image_id: str | None = None


class SimilarImage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An image that was found."""

    id: str
    #: Cosine similarity of the embeddings: 1 for the same direction, 0 for unrelated or opposite ones.
    score: float
    links: Links
    published_at: datetime
    source: str | None = None
    #: The label of each model of the deployment that gives labels.
    labels: dict[str, str] = {}


class Similar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One page of the nearest images, nearest first."""

    query: SearchedWith
    #: How it was searched: `approximate` becomes `exact` where an index would find less.
    mode: Mode
    images: tuple[SimilarImage, ...]
    #: Give this as `cursor` for the next page; absent on the last one.
    next_cursor: str | None = None


def links(image_id: str) -> Links:
    """Return an image's paths; the id is one segment whatever it contains."""
    path = "/v1/images/" + quote(image_id, safe="")
    return Links(path, path + "/content", path + "/predictions")


class JSONResponse(Response):
    """A struct as JSON."""

    media_type = "application/json"

    def __init__(
        self, value: msgspec.Struct, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        # Results change until they are final, and belong to whoever has the key.
        super().__init__(_encoder.encode(value), status, {"Cache-Control": "no-store"} | (headers or {}))


def describe(
    status: int, kind: type[msgspec.Struct], description: str, example: object = None
) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a response, and have `schemas` include its schema."""
    _described.add(kind)
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
    if example is not None:
        content["example"] = msgspec.to_builtins(example)
    return {status: {"description": description, "content": {"application/json": content}}}


def schemas() -> dict[str, Any]:
    """Return the JSON schemas of every struct that a route describes."""
    kinds = sorted(_described, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return dict(components)
