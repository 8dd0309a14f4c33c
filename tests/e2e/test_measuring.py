"""The measuring commands measure: short runs of each against a stack of their own."""

import os

import msgspec
import pytest

from loadtest import engine_results, results, search, soak, telemetry_bench
from millrace import benchmarks
from pipeline import settings
from pipeline.errors import ConfigurationError

pytestmark = pytest.mark.timeout(300)

takes_minutes = pytest.mark.skipif(
    "MILLRACE_TEST_BENCHES" not in os.environ, reason="takes minutes: `make bench-check` runs it"
)


def test_bench_measures_the_spine_and_the_loops(capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark has a rate for the spine and for each loop, latencies, and has lost nothing."""
    plan = results.Plan(pictures=12, offline_images=64, offline_repeats=1, online_seconds=3.0)
    assert benchmarks.run_bench(settings.load(), plan, as_json=True, write=False) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=results.Result)
    rates = (
        found.offline.images_per_second,
        found.offline.naive_images_per_second,
        found.offline.best_loop_images_per_second,
    )
    assert all(rate > 0 for rate in rates)
    assert 0 < found.online.p50_seconds <= found.online.p95_seconds <= found.online.p99_seconds
    assert found.online.sent == found.online.received > 0
    assert found.online.lost == 0


@takes_minutes
def test_the_engine_is_measured_beside_its_loops_and_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    """Each part has its numbers, they agree with each other, and the swap has lost and repeated nothing."""
    plan = engine_results.Plan(
        models=("mobilenet_v3_small",), pictures=8, width=320, height=240, offline_images=64, repeats=1,
        online_seconds=0.5, online_images_per_second=1_000.0, backlog_images=600,
        realtime_images_per_second=50.0, realtime_seconds=1.0, swap_images=200, shallow_images=64,
        shallow_repeats=2, deep_images=200,
    )  # fmt: skip
    assert benchmarks.run_engine(settings.load(), plan, as_json=True, write=False) == 0
    *_, last = capsys.readouterr().out.splitlines()
    found = msgspec.json.decode(last, type=engine_results.Result)
    assert found.models.keys() == set(plan.models)
    measured = found.models["mobilenet_v3_small"]
    offline = measured.offline
    assert offline.images == 64
    assert all(len(rates) == 1 and rates[0] > 0 for rates in offline.repeats.values())
    assert offline.repeats.keys() == offline.cpu_milliseconds.keys() == {"pipeline", "kafka", "best", "naive"}
    assert all(cpu > 0 for cpu in offline.cpu_milliseconds.values())
    pipeline = offline.pipeline_images_per_second
    assert offline.ratio_to_best == pytest.approx(pipeline / offline.best_images_per_second, rel=0.02)
    for online in measured.at_each_rate:
        assert 0 < online.p50_seconds <= online.p99_seconds
        assert 0 < online.kafka_p50_seconds <= online.kafka_p99_seconds
        assert 0 < online.best_p50_seconds <= online.best_p99_seconds
        assert 0 <= online.goodput <= 1
        assert online.cpu_milliseconds.keys() == {"worker", "broker", "client", "machine"}
    assert measured.online_at_80_percent.images_per_second == pytest.approx(
        0.8 * offline.best_images_per_second, rel=0.02
    )
    own = 0.8 * offline.pipeline_images_per_second
    assert measured.online_at_80_percent_of_own is not None
    assert measured.online_at_80_percent_of_own.images_per_second == pytest.approx(own, rel=0.02)
    assert found.backlog is not None
    assert found.backlog.realtime_p50_seconds <= found.backlog.realtime_p99_seconds
    assert found.backlog.realtime_sent > 0
    assert 0 <= found.backlog.left_images < found.backlog.images
    assert found.swap is not None
    assert (found.swap.lost, found.swap.repeated) == (0, 0)
    assert found.swap.predicted_by_old + found.swap.predicted_by_new == found.swap.images
    assert min(found.swap.predicted_by_old, found.swap.predicted_by_new) > 0
    assert found.swap.longest_gap_seconds > 0
    assert found.swap.longest_batch_seconds > 0
    assert found.depth is not None
    assert len(found.depth.repeats) == 2
    assert found.depth.ratio_of_deep > 0


@takes_minutes
def test_soak_watches_every_process_and_accounts(capsys: pytest.CaptureFixture[str]) -> None:
    """A soak has looked at each process, and every picture has ended as a result or a dead letter."""
    plan = soak.Plan(seconds=8.0, pictures=12, sample_seconds=1.0)
    benchmarks.run_soak(settings.load(), plan, as_json=True, write=False)
    found = msgspec.json.decode(capsys.readouterr().out, type=soak.Result)
    assert found.resident_bytes.keys() == {"gateway", "predict", "store", "archive"}
    assert found.ledger_records.keys() == {"predict", "store", "archive"}
    assert found.sent == found.results + found.dead_letters > 0
    assert found.dead_letters > 0
    assert found.lost == found.visible_duplicates == found.unexpected == 0


def test_search_is_measured_in_a_database_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Each set of vectors has its recall and the latencies of both modes."""
    plan = search.Plan(pictures=60, vectors=1_000, centres=20, queries=20)
    assert benchmarks.run_search(settings.load(), plan, as_json=True, write=False) == 0
    *_, last = capsys.readouterr().out.splitlines()  # behind what the log of this process says
    found = msgspec.json.decode(last, type=search.Result)
    for measured, count in ((found.pictures, 60), (found.clustered, 1_000), (found.unstructured, 1_000)):
        assert (measured.vectors, measured.queries, measured.exact_is_right) == (count, 20, 1.0)
        assert 0 < measured.recall_at_10 <= 1
        assert all(0 < way.p50_seconds <= way.p99_seconds for way in (measured.exact, measured.approximate))


def test_telemetry_is_measured_beside_a_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways through Kafka have stored what was published, and the growing database answers."""
    plan = telemetry_bench.Plan(
        gpus_per_host=8, hosts=2, records=120, single_records=600, repeats=1, growth_values=(480, 1_440),
        growth_interval_seconds=3_600, watched_seconds=90, scored_gpus=80,
    )  # fmt: skip
    assert (
        benchmarks.run_telemetry(
            settings.load(), plan, ["record", "growth", "watch", "score"], as_json=True, write=False
        )
        == 0
    )
    *_, last = capsys.readouterr().out.splitlines()
    found = msgspec.json.decode(last)
    for way in ("many", "single"):
        assert all(found["record"][way][name]["samples_per_second"] > 0 for name in ("record", "bare"))
    assert found["watch"]["windows"] == 2
    assert found["watch"]["samples_per_second"] > 0
    assert found["score"]["whole_seconds_per_10000_gpus"] > found["score"]["seconds_per_10000_gpus"] > 0
    steps = found["growth"]["steps"]
    assert [(step["values"], step["gpus"]) for step in steps] == [(480, 1), (1_440, 3)]
    assert all(step["insert_samples_per_second"] > 0 for step in steps)
    assert all(step[f"{name}_24h_seconds"] > 0 for step in steps for name in ("whole", "raw", "rolled"))


def test_a_section_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A section that does not exist is named with those that do."""
    with pytest.raises(ConfigurationError, match="there is no section x; there are record"):
        benchmarks.run_telemetry(settings.load(), telemetry_bench.Plan(), ["x"], as_json=True, write=False)
