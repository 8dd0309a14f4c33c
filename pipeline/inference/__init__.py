"""The engine: records in, exactly one typed outcome per record out, in any order.

It knows neither Kafka nor a database. How a record flows, and where each stage runs:

    submit ─> fetching (event loop; only with a dataref)
           ─> decoding (a pool of threads: digest, decode)
           ─> batching (event loop; claim right before dispatch)
           ─> device   (one thread: `forward`, all models on one batch; bisection)
           ─> deliver  (event loop; the outcomes of a batch together)

Other models take over in `swapping`.
"""

from pipeline.inference.engine import Engine, EngineOptions
from pipeline.inference.outcomes import Dropped, Expired, Failed, Outcome, Predicted, Request

__all__ = ["Dropped", "Engine", "EngineOptions", "Expired", "Failed", "Outcome", "Predicted", "Request"]
