"""Every Prometheus metric: name, unit, labels, buckets, help. `docs/metrics.md` lists the same ones.

Label values are bounded: never an image id, a file name or an error text.
"""

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

# The time of a metric's birth beside each one: nobody asks, everybody scrolls.
disable_created_metrics()  # type: ignore[no-untyped-call]

# 1 ms to 60 s: below, the clock's own noise; above, somebody has been paged.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# What waits in Kafka waits longer than what is at work. 5 s and 300 s are the deadlines that the rules in
# k8s/strimzi/alerts ask about: without a bucket of its own a deadline can only be guessed at.
_AGES = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

# Records: what happened to them
RECORDS_OPENED = Counter("millrace_records_opened", "Records received from Kafka.", ["step", "lane"])
RECORDS_FINISHED = Counter(
    "millrace_records_finished",
    "Records finished, by outcome: predicted, expired, dead_lettered, stored, archived, watched, late, skipped.",
    ["step", "lane", "outcome"],
)
RECORDS_FORGOTTEN = Counter(
    "millrace_records_forgotten", "Unstarted records given back to Kafka at a hand-over.", ["step"]
)
RECORDS_ABANDONED = Counter(
    "millrace_records_abandoned",
    "Started records dropped unacknowledged at a hand-over's deadline.",
    ["step"],
)
AGE_SECONDS = Histogram(
    "millrace_age_seconds",
    "From a record's timestamp in Kafka to when all that it causes was durable.",
    ["step", "lane"],
    buckets=_AGES,
)
DEAD_LETTERS = Counter("millrace_dead_letters", "Dead letters published, by error code.", ["step", "code"])
RETRIES = Counter(
    "millrace_retries", "Attempts repeated because a dependency failed.", ["step", "dependency"]
)
DUPLICATES = Counter(
    "millrace_duplicates", "Results already stored: same (repeat) or another picture (conflict).", ["kind"]
)
SECRETS_PASSED_OVER = Gauge(
    "millrace_secrets_passed_over", "1 while the former content of a changed secret is used.", ["setting"]
)

# Stages of one record, as Triton splits them
QUEUE_SECONDS = Histogram(
    "millrace_queue_seconds", "From receipt of a record to the start of its decode, plus the wait for a batch.",
    ["lane"], buckets=_SECONDS,
)  # fmt: skip
DECODE_SECONDS = Histogram("millrace_decode_seconds", "Decoding one picture.", buckets=_SECONDS)
FORWARD_SECONDS = Histogram(
    "millrace_forward_seconds", "One forward pass of one batch, all models.", buckets=_SECONDS
)
PUBLISH_SECONDS = Histogram(
    "millrace_publish_seconds", "From a result to the broker's acknowledgement.", ["step"], buckets=_SECONDS
)
STORE_SECONDS = Histogram("millrace_store_seconds", "One transaction of the store step.", buckets=_SECONDS)

# Batches
BATCH_SIZE = Histogram("millrace_batch_size", "Pictures in one forward pass.", buckets=_BATCH)
BATCHES = Counter("millrace_batches", "Batches given to the device, by why they were cut.", ["cut"])
FORWARD_JOULES = Counter("millrace_forward_joules", "Energy of forward passes, where NVML counts it.")

# Models
MODELS_REVISION = Gauge(
    "millrace_models_revision", "Revision of the models this worker runs; 0: `MILLRACE_MODELS`."
)
MODELS_WANTED_REVISION = Gauge(
    "millrace_models_wanted_revision", "Revision that the deployment should run; 0: `MILLRACE_MODELS`."
)
MODEL_SWAPS = Counter(
    "millrace_model_swaps", "Versions of models tried, by result: swapped, refused.", ["result"]
)

# Delivery
LEDGER_RECORDS = Gauge("millrace_ledger_records", "Records fetched and not finished.", ["step", "lane"])
LEDGER_BYTES = Gauge("millrace_ledger_bytes", "Bytes of open records.", ["step", "lane"])
LANE_PAUSED = Gauge(
    "millrace_lane_paused", "1 while a lane's partitions are paused for back-pressure.", ["step", "lane"]
)
COMMITS = Counter("millrace_commits", "Offset commits, by result: ok, refused, failed.", ["step", "result"])
COMMIT_AGE_SECONDS = Gauge(
    "millrace_commit_age_seconds",
    "Since the oldest finished, uncommitted record finished; 0 with none.",
    ["step"],
)
REBALANCES = Counter("millrace_rebalances", "Hand-overs of partitions: assigned, revoked.", ["step", "kind"])
HANDOVER_SECONDS = Histogram(
    "millrace_handover_seconds", "Finishing started work at a hand-over.", ["step"], buckets=_SECONDS
)
ASSIGNED_PARTITIONS = Gauge("millrace_assigned_partitions", "Partitions this worker owns.", ["step"])
OFFSETS_EXPIRED = Counter(
    "millrace_offsets_expired",
    "Records that retention deleted before this group read them.",
    ["step", "topic"],
)
CAREFUL_RECORDS = Counter(
    "millrace_careful_records", "Records read one at a time after their worker died.", ["step"]
)
LIMITER_OPEN = Gauge("millrace_limiter_open", "1 while model faults have paused the step.", ["step"])
READY = Gauge("millrace_ready", "1 while the worker is warm and a member of its group.", ["step"])
LAG_RECORDS = Gauge("millrace_lag_records", "Records not yet committed, by topic.", ["step", "topic"])

# GPU telemetry
SAMPLES_STORED = Counter("millrace_samples_stored", "GPU samples written to the database.")
SAMPLES_REPEATED = Counter(
    "millrace_samples_repeated",
    "GPU samples of a GPU and a time already stored: with the same (repeat) or other values (conflict).",
    ["kind"],
)
SAMPLES_DROPPED = Counter(
    "millrace_samples_dropped",
    "GPU samples, or values of samples, that were left out, by reason.",
    ["step", "reason"],
)
WINDOWS_CLOSED = Counter(
    "millrace_windows_closed",
    "Windows of a key that closed, by why: watermark, silence, pressure; event: an XID error.",
    ["cause"],
)
WINDOWS_LEFT_OUT = Counter(
    "millrace_windows_left_out",
    "Windows of a GPU that were not stored: of a GPU that is another host's (foreign), too old (expired).",
    ["reason"],
)
WINDOW_SCORE_SECONDS = Histogram(
    "millrace_window_score_seconds", "Aggregating and scoring windows that close together.", buckets=_SECONDS
)
WATCH_HELD_SAMPLES = Gauge("millrace_watch_held_samples", "Samples in windows that have not closed.")
WATCH_GPUS = Gauge("millrace_watch_gpus", "GPUs that this worker keeps an eye on.")
ALERT_STEPS = Counter(
    "millrace_alert_steps",
    "Alerts that became pending, firing or resolved, by severity.",
    ["state", "severity"],
)

# The collector of GPU telemetry
SAMPLES_COLLECTED = Counter("millrace_samples_collected", "GPU samples that the collector published.")
COLLECTED_GPUS = Gauge("millrace_collected_gpus", "GPUs the collector reads, by state: ok, lost.", ["state"])
COLLECT_SECONDS = Histogram(
    "millrace_collect_seconds", "Reading all GPUs once, or one scrape.", buckets=_SECONDS
)

# Notifications
NOTIFICATIONS = Counter(
    "millrace_notifications",
    "Steps of alerts and receivers, by what came of it: delivered, retried, silenced, failed.",
    ["receiver", "result"],
)
NOTIFICATION_SECONDS = Histogram(
    "millrace_notification_seconds", "One attempt to tell a receiver.", ["receiver"], buckets=_SECONDS
)
RECEIVER_FAILING = Gauge(
    "millrace_receiver_failing", "1 while a receiver does not take what it is sent.", ["receiver"]
)

# Gateway
UPLOADS = Counter("millrace_uploads", "Uploads, by lane and HTTP status.", ["lane", "status"])
REQUEST_SECONDS = Histogram(
    "millrace_request_seconds",
    "HTTP requests by route template.",
    ["method", "route", "status"],
    buckets=_SECONDS,
)
SEARCH_SECONDS = Histogram(
    "millrace_search_seconds", "Searches in the database, by how it searched.", ["mode"], buckets=_SECONDS
)


def show_zeros(step: str, topics: Iterable[str]) -> None:
    """Show what alerts ask about before it happens first: from nothing to 1 is no increase to Prometheus."""
    for code in ("model", "process_killed", "storage_refused"):
        DEAD_LETTERS.labels(step, code)
    for topic in topics:
        OFFSETS_EXPIRED.labels(step, topic)
    for kind in ("assigned", "revoked"):
        REBALANCES.labels(step, kind)
    for result in ("ok", "refused", "failed"):
        COMMITS.labels(step, result)
    for metric in (RECORDS_ABANDONED, CAREFUL_RECORDS, COMMIT_AGE_SECONDS, ASSIGNED_PARTITIONS, READY):
        metric.labels(step)
