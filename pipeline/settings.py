"""Every setting, read once from `MILLRACE_*` environment variables; secrets are read from files.

`docs/configuration.md` is checked against this class. A wrong value ends the process before readiness
with one line that names the variable.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipeline.errors import ConfigurationError

PREFIX = "MILLRACE_"
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_PASSWORD = re.compile(r"//[^/@]*@")  # the user's part of a URL

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """All settings of all parts; each part reads the ones it needs."""

    # An empty variable is an unset one, as compose files and charts write it.
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    # Kafka
    kafka_bootstrap_servers: str | None = Field(
        None, description="Brokers as host:port,…; none: the embedded Kafka."
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How clients speak to the brokers."
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism when the protocol has SASL."
    )
    kafka_sasl_username: str | None = Field(None, description="SASL user.")
    kafka_sasl_password_file: Path | None = Field(None, description="File with the SASL password.")
    kafka_tls_ca_file: Path | None = Field(None, description="PEM of the authorities that sign the brokers.")
    kafka_tls_certificate_file: Path | None = Field(None, description="PEM of this client's certificate.")
    kafka_tls_key_file: Path | None = Field(None, description="PEM of this client's private key.")
    topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="Put before every topic and consumer group name."
    )
    topic_replication_factor: Count = Field(
        1, description="Replicas of topics that `millrace topics apply` creates."
    )
    topic_partitions: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="Partitions of created topics; 0: what the topic table says."
    )

    # PostgreSQL and object store
    database_url: str | None = Field(None, description="postgresql://…; none: the embedded PostgreSQL.")
    database_password_file: Path | None = Field(
        None, description="File with the password of the database's user, which the URL then must not name."
    )
    database_pool_size: Count = Field(4, description="Connections one process may hold.")
    search_index_embeddings: Count = Field(
        10_000,
        description="From so many embeddings of one model version on, `store` builds an index for approximate "
        "search; fewer are searched exactly.",
    )
    object_store_url: str | None = Field(
        None, description="A folder, file://, s3://, gs:// or az:// URL; none: a folder in the data folder."
    )

    object_store_credentials: Path | None = Field(
        None,
        description="Folder with the bucket's credentials, in files that are named as the provider's variables "
        "(`AWS_ACCESS_KEY_ID`, …); none: from the environment alone.",
    )

    # One machine
    data_dir: Path = Field(Path(".millrace"), description="Where the embedded parts keep data and logs.")
    kafka_port: Port = Field(9092, description="Port of the embedded Kafka.")
    kafka_controller_port: Port = Field(9093, description="Controller port of the embedded Kafka.")
    kafka_heap_megabytes: Annotated[int, Field(ge=128)] = Field(
        512, description="JVM heap of the embedded Kafka."
    )
    postgres_port: Port = Field(5440, description="Port of the embedded PostgreSQL.")

    # Gateway
    gateway_host: str = Field("127.0.0.1", description="Address the gateway binds to; others need API keys.")
    gateway_port: Port = Field(8040, description="Port of the gateway.")
    api_keys_file: Path | None = Field(None, description="File with one API key per line.")
    search_timeout_seconds: Seconds = Field(
        10.0, description="How long a search with an uploaded picture waits for the picture's embedding."
    )
    gateway_url: str | None = Field(
        None, description="Where the command line finds the gateway; none: host and port."
    )

    # Workers
    worker_host: str = Field("127.0.0.1", description="Address of a worker's /livez, /readyz and /metrics.")
    worker_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="Port of a worker's HTTP site; 0: any free one, logged at start."
    )
    session_timeout_seconds: Seconds = Field(
        20.0,
        description="A silent worker loses its partitions after this; heartbeats go on during long batches.",
    )
    rebalance_timeout_seconds: Seconds = Field(
        300.0, description="How long the group waits for workers that finish started work before a hand-over."
    )
    shutdown_grace_seconds: Seconds = Field(
        30.0,
        description="After SIGTERM: started work finishes within this, else the process exits unacknowledged.",
    )
    commit_interval_seconds: Seconds = Field(
        0.25, description="How often finished offsets are committed: what a SIGKILL repeats at most, in time."
    )
    max_open_records: Count = Field(
        1000, description="Records one lane may hold before its partitions are paused."
    )
    max_open_bytes: Count = Field(
        64 * 1024 * 1024, description="Bytes one lane may hold before it is paused."
    )
    store_batch_records: Count = Field(500, description="Most records `store` writes in one transaction.")
    store_batch_bytes: Count = Field(
        16 * 1024 * 1024, description="Most bytes `store` writes in one transaction."
    )

    # Inference
    deployment: str = Field(
        "default",
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Name of the set of models; a consumer group each.",
    )
    models: str = Field(
        "builtin:quality,builtin:fingerprint",
        description="Models evaluated on each picture, comma-separated.",
    )
    model_cache: Path | None = Field(
        None, description="Folder with the weights of models; none: `models` in the data folder."
    )
    replica: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Name of this `predict` worker in `models.v1`; none: host name and process id.",
    )
    allow_python_models: bool = Field(
        False, description="Allow models named python:MODULE:ATTRIBUTE, which run the code they name."
    )
    allow_exported_models: bool = Field(
        False, description="Allow models from local .pt2 files, which run code when they are loaded."
    )
    device: str = Field(
        "auto",
        description="auto (for `predict` a GPU that proves itself at start, else the CPU), cpu, cuda or cuda:N; "
        "several for `predict`, one process each: cuda:0,cuda:1 or cuda:all.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Numbers of a forward pass; auto: fewer bits if faster here and as good."
    )
    torch_compile: bool = Field(
        False, description="Compile models with torch.compile; takes minutes at start, and a C++ compiler."
    )
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="Most pictures in one forward pass."
    )
    max_batch_bytes: Count = Field(
        256 * 1024 * 1024, description="Most bytes of decoded pictures in one forward pass."
    )
    decode_threads: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Decoder threads; 0: one per core."
    )
    torch_threads: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Torch CPU threads; 0: one for small models, else torch decides."
    )
    max_image_bytes: Count = Field(
        32 * 1024 * 1024, description="Largest encoded picture, inline or by dataref."
    )
    max_image_pixels: Count = Field(
        100_000_000, description="Largest picture; more is refused before decoding."
    )
    missing_object_grace_seconds: Annotated[float, Field(ge=0)] = Field(
        60.0,
        description="How long an object behind a dataref may be missing before that is the record's fault.",
    )
    batch_hang_seconds: Seconds = Field(
        600.0, description="A forward pass longer than this ends the process without acknowledging."
    )
    max_model_faults: Count = Field(
        20, description="So many model faults, if they are the majority of the last records, pause the step."
    )
    fault_probe_seconds: Seconds = Field(
        60.0, description="While paused by model faults: one record is tried this often."
    )

    # Alerts
    receivers_file: Path | None = Field(
        None, description="YAML file that says who is told of alerts; none: nobody."
    )
    energy_price_per_kwh: Annotated[float, Field(ge=0)] | None = Field(
        None, description="What a kilowatt-hour costs, for `/v1/energy`; none: no costs are told."
    )
    gpu_hour_price: Annotated[float, Field(ge=0)] | None = Field(
        None, description="What an hour of a GPU costs, for the cost of idle ones; none: it is not told."
    )
    currency: str = Field("USD", pattern=r"^[A-Z]{3}$", description="Currency of the prices (ISO 4217).")

    # GPU telemetry: watch
    watch_window_seconds: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        60.0, description="Length of the windows that `watch` makes of samples."
    )
    watch_lateness_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        20.0,
        description="How long after a window's end, by the clock of its samples, more of them may come.",
    )
    watch_silence_seconds: Annotated[float, Field(ge=1, le=24 * 3600)] = Field(
        120.0, description="The windows of a host (or what else the key is) that is silent for so long close."
    )
    watch_max_samples: Count = Field(
        500_000,
        description="Samples that a partition may hold in open windows; beyond it the oldest close early.",
    )
    watch_model: str | None = Field(
        None,
        description="Learned model that scores windows: file:PATH (an autoencoder) or python:MODULE:ATTRIBUTE.",
    )
    rules_file: Path | None = Field(
        None, description="YAML with rules that add to those that are built in, or replace them."
    )

    # Retention
    result_retention_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        90.0,
        description="`millrace retention` deletes images, results, dead letters and objects older than this.",
    )

    sample_retention_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        14.0, description="`record` drops the samples of days older than this."
    )
    minute_retention_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        60.0, description="`record` drops the one-minute roll-ups of months older than this."
    )
    hour_retention_days: Annotated[float, Field(gt=0, le=36_500)] = Field(
        400.0, description="`record` drops the one-hour roll-ups of months older than this."
    )

    # Logs
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="One JSON object per line, or coloured text."
    )

    @field_validator("api_keys_file", "database_password_file", "kafka_sasl_password_file", "kafka_tls_ca_file",
                     "kafka_tls_certificate_file", "kafka_tls_key_file", "receivers_file")  # fmt: skip
    @classmethod
    def _is_readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                path.open("rb").close()
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}") from None
        return path

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _are_addresses(cls, servers: str | None) -> str | None:
        if servers is None:
            return None
        addresses = [address.strip() for address in servers.split(",")]
        for address in addresses:
            found = _ADDRESS.fullmatch(address)
            if not found or not 0 < int(found["port"]) < 2**16:
                raise ValueError(f"{address!r} is not host:port")
        return ",".join(addresses)

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).scheme not in {"postgresql", "postgres"}:
            raise ValueError("must start with postgresql://")
        for host in urlsplit(url or "").netloc.rpartition("@")[2].split(","):
            port = host.rpartition("]")[2].partition(":")[2]  # an IPv6 address has colons of its own
            if port and not (port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"{port!r} is not a port")
        return url

    @model_validator(mode="after")
    def _agree(self) -> "Settings":
        if self.gateway_host not in LOOPBACK_HOSTS and self.api_keys_file is None:
            raise ValueError(
                f"{PREFIX}API_KEYS_FILE: must be set because {PREFIX}GATEWAY_HOST is {self.gateway_host}, "
                "not loopback"
            )
        if "SASL" in self.kafka_security_protocol and not (
            self.kafka_sasl_username and self.kafka_sasl_password_file
        ):
            raise ValueError(
                f"{PREFIX}KAFKA_SASL_USERNAME and {PREFIX}KAFKA_SASL_PASSWORD_FILE: must be set because "
                f"{PREFIX}KAFKA_SECURITY_PROTOCOL is {self.kafka_security_protocol}"
            )
        if self.database_password_file is not None and (
            self.database_url is None or urlsplit(self.database_url).password is not None
        ):
            raise ValueError(
                f"{PREFIX}DATABASE_PASSWORD_FILE: needs {PREFIX}DATABASE_URL, without a password in it"
            )
        if (self.kafka_tls_certificate_file is None) != (self.kafka_tls_key_file is None):
            raise ValueError(
                f"{PREFIX}KAFKA_TLS_CERTIFICATE_FILE and {PREFIX}KAFKA_TLS_KEY_FILE: set both or neither"
            )
        return self

    @property
    def resolved_kafka(self) -> str:
        """Bootstrap servers, the embedded broker's when none are set."""
        return self.kafka_bootstrap_servers or f"127.0.0.1:{self.kafka_port}"

    @property
    def resolved_database(self) -> str:
        """Database URL, the embedded one's when none is set."""
        if self.database_url:
            return self.database_url
        # Where the embedded server keeps its password, see `millrace/postgres.py`.
        password_file = quote(str(self.data_dir.absolute() / "postgres" / "pgpass"))
        return f"postgresql://postgres@127.0.0.1:{self.postgres_port}/millrace?passfile={password_file}"

    @property
    def resolved_object_store(self) -> str:
        """Object store URL, a folder in the data folder when none is set."""
        return self.object_store_url or str((self.data_dir / "objects").absolute())

    @property
    def resolved_model_cache(self) -> Path:
        """Folder with the weights of models, in the data folder when none is set."""
        return self.model_cache or self.data_dir.absolute() / "models"

    @property
    def resolved_gateway(self) -> str:
        """Base URL of the gateway, without a trailing slash."""
        return (self.gateway_url or f"http://{self.gateway_host}:{self.gateway_port}").rstrip("/")

    def topic(self, name: str) -> str:
        """Return a topic's name on the broker."""
        return self.topic_prefix + name

    def group(self, step: str) -> str:
        """Return a step's consumer group; `predict` has one per deployment."""
        return self.topic_prefix + (f"predict.{self.deployment}" if step == "predict" else step)


def load(**overrides: object) -> Settings:
    """Read the settings from the environment.

    Raises:
        ConfigurationError: one line per wrong setting, each naming its variable.
    """
    _refuse_misspelt()
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError("; ".join(_describe(fault) for fault in error.errors())) from None


def _describe(fault: object) -> str:
    assert isinstance(fault, dict)
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    shown = _PASSWORD.sub("//…@", repr(fault.get("input")))[:80]
    return f"{PREFIX}{str(fault['loc'][0]).upper()}: {message} (got {shown})"


def _refuse_misspelt() -> None:
    """Refuse a variable that is nearly a setting; others with the prefix may be somebody else's."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            meant = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            if meant:
                raise ConfigurationError(f"{name}: there is no such setting; {meant[0]} is meant?")
