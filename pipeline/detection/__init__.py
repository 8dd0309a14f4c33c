"""Detection: samples of GPUs become closed windows with aggregates, scores and the conditions that hold.

    Samples -> watch.py (whose window, which rows) -> closing.py (what is scored together, and in which order)
            -> aggregates.py (numbers of each GPU over the window)
            -> score.py (peers, history, rules: one batched torch pass over all GPUs that close together)
            -> describe.py (conditions in words) -> Windows

It knows neither Kafka nor a clock: everything follows from the samples, in their order, and from the state that
the last window of a key carries. The same samples give the same windows, number for number.
"""

from pipeline.detection.closing import Closed, Closing, close_all, close_round, rounds_of
from pipeline.detection.learned import WindowModel, load_window_model
from pipeline.detection.rules import RuleBook, load_rules
from pipeline.detection.watch import Fed, Watch, WatchOptions

__all__ = [
    "Closed",
    "Closing",
    "Fed",
    "RuleBook",
    "Watch",
    "WatchOptions",
    "WindowModel",
    "close_all",
    "close_round",
    "load_rules",
    "load_window_model",
    "rounds_of",
]
