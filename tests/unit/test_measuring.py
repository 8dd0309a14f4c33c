import asyncio
import itertools
import random
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import engine_load, engine_results, faults, meter, results, soak
from loadtest.drive import arrivals
from loadtest.report import Circumstances, Machine, Timing, percentile, rounded
from millrace import benchmarks
from pipeline import events

MEBIBYTE = 1024 * 1024
CIRCUMSTANCES = Circumstances(
    time=datetime(2026, 1, 1, tzinfo=UTC),
    commit="abc",
    machine=Machine(cores=2, cpu_model="some", memory_gibibytes=8.0, system="Linux x86_64"),
    versions={},
    load_before=0.0,
)


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100)])
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    """The p-th percentile of 1 to 100 is p."""
    values = list(range(1, 101))
    random.Random(1).shuffle(values)
    assert percentile(values, share) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1.0))
def test_percentile_is_measured_and_covers_its_share(values: list[float], share: float) -> None:
    """A percentile is one of the values, and at least that share of them is not above it."""
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_percentile_of_nothing_is_an_error() -> None:
    """There is no percentile of no values."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_arrivals_are_seeded_and_have_their_rate() -> None:
    """The same seed gives the same arrivals, another one others, and 30 a second are 30 a second."""
    first, again, other = (list(itertools.islice(arrivals(30.0, seed), 3000)) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert first == sorted(first)
    assert 95 < first[-1] < 105


def test_lateness_is_against_the_schedule() -> None:
    """A driver that keeps to its schedule is not late; one that stops for a second is late by it."""
    due = list(itertools.islice(arrivals(30.0, 7), 10))
    punctual = [100.0 + moment for moment in due]
    assert max(map(abs, meter.lateness(punctual, 30.0, 7))) < 1e-9
    stalled = [moment + (1.0 if number > 4 else 0.0) for number, moment in enumerate(punctual)]
    assert meter.lateness(stalled, 30.0, 7)[-1] == pytest.approx(1.0)


def test_ratios_are_of_the_medians() -> None:
    """One slow repeat changes no ratio."""
    timings = {
        "spine": [Timing(100, seconds, 1.0) for seconds in (1.0, 1.0, 50.0)],
        "naive": [Timing(100, 2.0, 1.5)] * 3,
        "best_loop": [Timing(100, 0.8, None)] * 3,
    }
    found = results.compare(timings, 100, 32)
    assert (found.images_per_second, found.ratio_to_naive, found.ratio_to_best_loop) == (100.0, 2.0, 0.8)
    assert (found.cpu_milliseconds_per_image, found.naive_cpu_milliseconds_per_image) == (10.0, 15.0)
    assert found.best_loop_cpu_milliseconds_per_image is None


def test_repeats_change_who_goes_first() -> None:
    """Over as many repeats as there are arms, each is first once and none is left out."""
    orders = [results.in_turn(results.ARMS, number) for number in range(3)]
    assert {order[0] for order in orders} == set(results.ARMS)
    assert all(sorted(order) == sorted(results.ARMS) for order in orders)


def test_results_are_cut_to_what_is_known() -> None:
    """Three digits are kept, whatever the size."""
    assert (rounded(0.0234567), rounded(234.567), rounded(0.0)) == (0.0235, 235.0, 0.0)


def test_slope_ignores_a_few_peaks() -> None:
    """A tenth of wild values does not tilt the line; a steady rise shows in full."""
    at = [float(second) for second in range(0, 300, 5)]
    level = [100.0 + (500.0 if number % 10 == 0 else 0.0) for number in range(len(at))]
    assert abs(soak.slope(at, level)) < 0.1
    assert soak.slope(
        at, [value + 2 * second for value, second in zip(level, at, strict=True)]
    ) == pytest.approx(2.0)


@given(st.floats(-10, 10), st.floats(-1e6, 1e6))
def test_slope_of_a_line_is_its_own(rise: float, start: float) -> None:
    """Points on a line have that line's slope."""
    at = [0.0, 1.0, 2.5, 4.0]
    assert soak.slope(at, [start + rise * x for x in at]) == pytest.approx(rise, abs=1e-6)


def judge(
    memory: float = 0.0,
    ledger: float = 0.0,
    lag: float = 0.0,
    *,
    lost: tuple[str, ...] = (),
    open_at_end: int = 0,
) -> soak.Result:
    """Judge a ten-minute run in which numbers grow by so much a minute."""
    draw = random.Random(1)
    samples = []
    for second in range(0, 601, 5):
        warm_up = max(0, 60 - second)  # pools fill in the first minute, which must not count
        minutes = second / 60
        samples.append(
            soak.Sample(
                at_seconds=float(second),
                resident_bytes={
                    "predict": int((600 - warm_up + memory * minutes + draw.uniform(0, 8)) * MEBIBYTE)
                },
                ledger_records={"predict": int(10 + ledger * minutes + draw.uniform(0, 30))},
                lag_records=int(20 + lag * minutes + draw.uniform(0, 60)),
            )
        )
    accounting = faults.Accounting(
        sent=100, results=98, dead_letters=2, lost=lost, visible_duplicates=(), unexpected=(), repeated=0
    )
    ends = {"predict": open_at_end}
    return soak.conclude(CIRCUMSTANCES, soak.Plan(), samples, accounting, ledger_at_end=ends)


def test_a_healthy_run_is_flat() -> None:
    """Warm-up, noise, and a little growth below the limit are no fault."""
    assert judge().faults == ()
    assert judge(memory=1.0).faults == ()
    assert judge(memory=-20.0, ledger=-1.0).faults == ()


@pytest.mark.parametrize(
    ("growing", "what"),
    [
        ({"memory": 4.0}, "predict grew by"),
        ({"ledger": 15.0}, "the ledger of predict grew by"),
        ({"lag": 60.0}, "lag grew by"),
        ({"lost": ("x",)}, "the accounting is not clean"),
        ({"open_at_end": 1}, "1 records of predict are still open"),
    ],
)
def test_growth_and_loss_are_faults(growing: dict[str, object], what: str) -> None:
    """Each thing that must stay flat is a fault of its own when it does not, and the reason says which."""
    (reason,) = judge(**growing).faults  # type: ignore[arg-type]
    assert reason.startswith(what)


def test_the_gap_of_a_swap_is_the_longest_that_touches_it() -> None:
    """Silence before the activation or after the report is not the swap's; what repeats or is lost is counted."""
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    # Milliseconds from the activation, the revision, and how long the forward pass took.
    moments = [(-900, 0, 0.9), (-100, 0, 0.1), (50, 0, 0.12), (260, 0, 0.2), (600, 1, 0.1), (2000, 1, 0.7)]
    made = [
        (
            round(begun.timestamp() * 1000) + at_ms,
            events.Prediction(
                id=str(at_ms),
                image_id=str(number),
                deployment="default",
                lane="bulk",
                outcome="predicted",
                time=begun,
                receipt=events.Receipt(topic="t", partition=0, offset=number, forward_seconds=seconds),
                revision=revision,
            ),
        )
        for number, (at_ms, revision, seconds) in enumerate(moments)
    ]
    ids = [str(number) for number in range(7)]
    ended = begun + timedelta(milliseconds=500)
    found = engine_load.conclude_swap([*made, made[0]], ids, begun, ended, 3, 100.0)
    assert (found.longest_gap_seconds, found.longest_gap_otherwise_seconds) == (0.34, 1.4)
    assert (found.longest_batch_seconds, found.seconds) == (0.2, 0.5)
    assert (found.predicted_by_old, found.predicted_by_new) == (5, 2)
    assert (found.lost, found.repeated, found.left_images) == (1, 1, 3)


async def test_outcomes_are_waited_for_by_share() -> None:
    """A share of the ids is enough where it is asked for, and ids of others do not count."""
    outcomes = meter.Outcomes()
    ids = [f"ours-{number}" for number in range(10)]
    outcomes.seen |= {f"other-{number}": 0.0 for number in range(20)} | dict.fromkeys(ids[:3], 0.0)
    outcomes.dead.add(ids[3])
    await outcomes.wait(ids, share=0.4)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outcomes.wait(ids, share=0.5), 0.01)


def test_what_was_not_measured_is_kept_with_its_commit() -> None:
    """A run of one model leaves the others and the parts under load as they were, and says of which commit."""
    kept = msgspec.json.decode((benchmarks.KEPT / "engine.json").read_bytes(), type=engine_results.Result)
    assert kept.depth is not None
    again = next(iter(kept.models.values()))
    new = msgspec.structs.replace(
        kept, commit="new", commits={}, models={"resnet18": again}, backlog=None, swap=None, depth=None
    )
    merged = engine_results.merged(kept, new)
    assert merged.commit == merged.commits["resnet18"] == "new"
    assert merged.models == {**kept.models, "resnet18": again}
    assert (merged.backlog, merged.swap, merged.depth) == (kept.backlog, kept.swap, kept.depth)
    assert merged.commits["depth"] == kept.commits.get("depth", kept.commit) != "new"
    assert engine_results.rows(merged)
