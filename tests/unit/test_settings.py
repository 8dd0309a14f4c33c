"""Settings: each wrong one is one line that names its variable; the defaults need nothing."""

import re
from pathlib import Path
from typing import get_args

import pytest

from pipeline import settings
from pipeline.errors import ConfigurationError
from pipeline.settings import PREFIX, Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def test_nothing_need_be_set() -> None:
    """Without any variable everything is embedded, on this machine's loopback address."""
    given = settings.load()
    assert given.resolved_kafka == "127.0.0.1:9092"
    assert given.resolved_database.startswith("postgresql://postgres@127.0.0.1:5440/")
    assert given.resolved_gateway == "http://127.0.0.1:8040"
    assert Path(given.resolved_object_store) == Path(".millrace/objects").absolute()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS", "localhost"),
        ("KAFKA_BOOTSTRAP_SERVERS", "a:9092,,b:9092"),
        ("KAFKA_BOOTSTRAP_SERVERS", "a:port"),
        ("KAFKA_BOOTSTRAP_SERVERS", "a:99999"),
        ("KAFKA_BOOTSTRAP_SERVERS", "kafka://a:9092"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS"),
        ("KAFKA_SASL_MECHANISM", "GSSAPI"),
        ("KAFKA_SASL_PASSWORD_FILE", "missing/password"),
        ("KAFKA_TLS_CA_FILE", "missing/ca.pem"),
        ("KAFKA_TLS_CERTIFICATE_FILE", "missing/certificate.pem"),
        ("KAFKA_TLS_KEY_FILE", "missing/key.pem"),
        ("TOPIC_PREFIX", "not a topic name"),
        ("TOPIC_REPLICATION_FACTOR", "0"),
        ("TOPIC_PARTITIONS", "-1"),
        ("DATABASE_URL", "mysql://localhost/millrace"),
        ("DATABASE_URL", "postgresql://localhost:port/millrace"),
        ("DATABASE_POOL_SIZE", "none"),
        ("KAFKA_PORT", "65536"),
        ("KAFKA_CONTROLLER_PORT", "x"),
        ("KAFKA_HEAP_MEGABYTES", "1"),
        ("POSTGRES_PORT", "0"),
        ("GATEWAY_PORT", "tcp://10.0.0.1:8040"),  # what Kubernetes sets for a service `millrace-gateway`
        ("API_KEYS_FILE", "missing/keys"),
        ("WORKER_PORT", "-1"),
        ("SESSION_TIMEOUT_SECONDS", "0"),
        ("REBALANCE_TIMEOUT_SECONDS", "nan"),
        ("SHUTDOWN_GRACE_SECONDS", "inf"),
        ("COMMIT_INTERVAL_SECONDS", "soon"),
        ("MAX_OPEN_RECORDS", "0"),
        ("MAX_OPEN_BYTES", "1e6.5"),
        ("STORE_BATCH_RECORDS", "0"),
        ("STORE_BATCH_BYTES", "0"),
        ("DEPLOYMENT", "Default Deployment"),
        ("ALLOW_PYTHON_MODELS", "perhaps"),
        ("MAX_BATCH_SIZE", "5000"),
        ("DECODE_THREADS", "-1"),
        ("TORCH_THREADS", "-1"),
        ("MAX_IMAGE_BYTES", "0"),
        ("MAX_IMAGE_PIXELS", "0"),
        ("MISSING_OBJECT_GRACE_SECONDS", "-1"),
        ("BATCH_HANG_SECONDS", "0"),
        ("MAX_MODEL_FAULTS", "0"),
        ("FAULT_PROBE_SECONDS", "0"),
        ("RESULT_RETENTION_DAYS", "inf"),
        ("LOG_LEVEL", "chatty"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong value ends in a ConfigurationError of one line with the variable and what was given."""
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigurationError) as caught:
        settings.load()
    assert caught.value.message.startswith(f"{PREFIX}{name}: ")
    assert value[:60] in caught.value.message
    assert "\n" not in caught.value.message


def test_several_wrong_settings_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets two things wrong is told of both."""
    monkeypatch.setenv(PREFIX + "KAFKA_PORT", "x")
    monkeypatch.setenv(PREFIX + "LOG_LEVEL", "y")
    with pytest.raises(ConfigurationError) as caught:
        settings.load()
    assert re.findall(rf"{PREFIX}[A-Z_]+", caught.value.message) == [
        f"{PREFIX}KAFKA_PORT",
        f"{PREFIX}LOG_LEVEL",
    ]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"GATEWAY_HOST": "0.0.0.0"}, ["API_KEYS_FILE", "GATEWAY_HOST"]),
        (
            {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"},
            ["KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD_FILE", "KAFKA_SECURITY_PROTOCOL"],
        ),
        (
            {"KAFKA_TLS_KEY_FILE": "{file}"},
            ["KAFKA_TLS_CERTIFICATE_FILE", "KAFKA_TLS_KEY_FILE"],
        ),
    ],
)
def test_settings_that_do_not_go_together_name_each_other(
    given: dict[str, str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that need each other are named together, in one line."""
    file = tmp_path / "file"
    file.touch()
    for name, value in given.items():
        monkeypatch.setenv(PREFIX + name, value.format(file=file))
    with pytest.raises(ConfigurationError) as caught:
        settings.load()
    for name in named:
        assert PREFIX + name in caught.value.message
    assert "\n" not in caught.value.message


def test_an_address_for_everybody_needs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway binds to another address than loopback only with API keys."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    monkeypatch.setenv(PREFIX + "GATEWAY_HOST", "0.0.0.0")
    monkeypatch.setenv(PREFIX + "API_KEYS_FILE", str(keys))
    assert settings.load().gateway_host == "0.0.0.0"


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong URL is shown without its user's part."""
    monkeypatch.setenv(PREFIX + "DATABASE_URL", "mysql://me:sesame@db/millrace")
    with pytest.raises(ConfigurationError) as caught:
        settings.load()
    assert "sesame" not in caught.value.message
    assert "mysql://…@db/millrace" in caught.value.message


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty variables, as compose files write them, leave every default."""
    for name in Settings.model_fields:
        monkeypatch.setenv(PREFIX + name.upper(), "")
    assert settings.load() == Settings.model_validate({})


def test_names_get_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics and groups carry the installation's prefix; `predict` has a group per deployment."""
    monkeypatch.setenv(PREFIX + "TOPIC_PREFIX", "team-a.")
    monkeypatch.setenv(PREFIX + "DEPLOYMENT", "wildlife")
    given = settings.load()
    assert given.topic("images.bulk.v1") == "team-a.images.bulk.v1"
    assert [given.group(step) for step in ("predict", "store", "archive")] == [
        "team-a.predict.wildlife",
        "team-a.store",
        "team-a.archive",
    ]


def test_units_are_in_names() -> None:
    """A number with a unit has it in its name."""
    units = ("_seconds", "_bytes", "_days", "_pixels", "_megabytes")
    unitless = (
        "_port",
        "_factor",
        "_partitions",
        "_size",
        "_records",
        "_embeddings",
        "_samples",
        "_threads",
        "_faults",
    )
    for name, field in Settings.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)} & {int, float}
        assert not kinds or name.endswith(units + unitless), name


def test_a_misspelt_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is nearly a setting is refused and names the one that is meant."""
    monkeypatch.setenv("MILLRACE_MAX_BATCHSIZE", "8")
    with pytest.raises(ConfigurationError, match=r"MAX_BATCHSIZE: .*MILLRACE_MAX_BATCH_SIZE"):
        settings.load()


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kubernetes sets for a service of the same name, and what tests set, is ignored."""
    for name in ("MILLRACE_GATEWAY_SERVICE_PORT", "MILLRACE_GATEWAY_SERVICE_HOST", "MILLRACE_TEST_KAFKA"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8040")
    assert settings.load().gateway_port == 8040
