"""Vectors as values: which can be compared, what a search asks and what it finds. No SQL, no I/O."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec

Mode = Literal["exact", "approximate"]

# pgvector: an HNSW index takes `vector` up to 2,000 dimensions and `halfvec` up to 4,000.
MAX_VECTOR_INDEX_DIMENSIONS = 2_000
MAX_HALFVEC_INDEX_DIMENSIONS = 4_000
INDEX_PREFIX = "embeddings_hnsw_"


class Space(msgspec.Struct, frozen=True):
    """Vectors that can be compared: those of one version of one model."""

    model: str
    version: str
    dimension: int

    @property
    def index_type(self) -> str | None:
        """The type that an HNSW index of this space is on; None when there can be no such index."""
        if self.dimension <= MAX_VECTOR_INDEX_DIMENSIONS:
            return f"vector({self.dimension})"
        if self.dimension <= MAX_HALFVEC_INDEX_DIMENSIONS:
            return f"halfvec({self.dimension})"
        return None

    @property
    def index_name(self) -> str:
        """The name of its index: PostgreSQL cuts names at 63 bytes, so a digest stands for model and version."""
        text = msgspec.json.encode([self.model, self.version])
        return f"{INDEX_PREFIX}{hashlib.sha256(text).hexdigest()[:16]}_{self.dimension}"


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One model's vector of one prediction."""

    prediction_id: str
    image_id: str
    deployment: str
    space: Space
    numbers: Sequence[float]


class Filters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which images may be found; what is None does not matter."""

    #: A label that any model of the deployment gave the image or something in it.
    label: str | None = None
    source: str | None = None
    #: Published at this moment or later.
    since: datetime | None = None
    #: Published before this moment.
    until: datetime | None = None


class After(msgspec.Struct, frozen=True):
    """The last one of a page, which the next page begins behind."""

    distance: float
    image_id: str


class Hit(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was found."""

    image_id: str
    prediction_id: str
    #: Cosine distance: 0 for the same direction, 1 for none in common, 2 for opposite ones.
    distance: float
    published_at: datetime
    source: str | None
    #: What each model of the prediction that gives labels says.
    labels: dict[str, str]

    @property
    def score(self) -> float:
        """Cosine similarity: 1 for the same direction; opposite ones count as 0."""
        return min(1.0, max(0.0, round(1.0 - self.distance, 6)))


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One page of a search, nearest first, and whether more follow."""

    mode: Mode
    hits: tuple[Hit, ...]
    has_more: bool

    @property
    def last(self) -> After | None:
        """Where the next page begins; None without hits."""
        return After(self.hits[-1].distance, self.hits[-1].image_id) if self.hits else None
