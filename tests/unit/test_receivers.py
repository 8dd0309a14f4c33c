"""The file of receivers, who is told of what, and what is sent: pure, and each fault is one clear line."""

import base64
import hmac
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agents import messages
from agents.senders import retry_after_seconds
from pipeline import receivers
from pipeline.errors import ConfigurationError
from pipeline.notifications import Message, message_id
from pipeline.receivers import Receiver
from tests.support.receivers import SECRET, alert

NOW = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)


def receiver(**values: Any) -> Receiver:
    given = {"name": "on-call", "kind": "webhook", "url": "http://localhost:1/hook"} | values
    return msgspec.convert(given, Receiver)


def written(folder: Path, text: str) -> Path:
    path = folder / "receivers.yaml"
    path.write_text(text)
    return path


def test_a_file_of_receivers_is_read(tmp_path: Path) -> None:
    """Each kind with all it can have; secrets and secret URLs come from files of their own."""
    (tmp_path / "url").write_text("https://hooks.example.org/services/T/B/x\n")
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    found = receivers.read(
        written(
            tmp_path,
            f"""
receivers:
  - {{name: on-call, kind: webhook, url: "https://example.org/hook", secret_file: {tmp_path}/secret,
      match: {{severity: [critical, warning], host: "gpu-*"}}, group_by: [host], group_wait_seconds: 10,
      timeout_seconds: 5, give_up_seconds: 3600, send_resolved: false}}
  - {{name: chat, kind: slack, url_file: {tmp_path}/url}}
  - {{name: am, kind: alertmanager, url: "http://alertmanager:9093/"}}
""",
        )
    )
    assert [each.address() for each in found] == [
        "https://example.org/hook",
        "https://hooks.example.org/services/T/B/x",
        "http://alertmanager:9093/api/v2/alerts",
    ]
    assert found[0].secrets() == [base64.b64decode(SECRET.removeprefix("whsec_"))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("receivers: [", "receivers.yaml"),
        ("[]", "Expected `object`"),
        ("receivers: [{kind: webhook, url: 'http://a'}]", "name"),
        ("receivers: [{name: a, kind: pager, url: 'http://a'}]", "pager"),
        ("receivers: [{name: a, kind: webhook}]", "a: give either url or url_file"),
        ("receivers: [{name: a, kind: webhook, url: 'http://a', url_file: b}]", "a: give either url or url_file"),
        ("receivers: [{name: a, kind: webhook, url: 'ftp://user:password@a'}]", "a: its URL is none of"),
        ("receivers: [{name: a, kind: webhook, url: 'http://[a'}]", "a: its URL is none of"),
        ("receivers: [{name: a, kind: webhook, url: 'http://a', timeout: 5}]", "timeout"),
        ("receivers: [{name: a, kind: webhook, url: 'http://a', timeout_seconds: 0}]", "timeout_seconds"),
        ("receivers: [{name: a, kind: slack, url: 'http://a', secret_file: s}]", "signs webhooks only"),
        ("receivers: [{name: a, kind: webhook, url: 'http://a', secret_file: missing}]", "No such file"),
        ("receivers: [{name: a, kind: webhook, url: 'http://a', match: {'a b': c}}]", "name of a label"),
        ("receivers: [{name: a, kind: webhook, url: 'http://a', match: {rule: []}}]", "there must be a value"),
        (
            "receivers: [{name: a, kind: slack, url: 'http://a'}, {name: a, kind: slack, url: 'http://b'}]",
            "a: there are several of this name",
        ),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_says_what(tmp_path: Path, text: str, expected: str) -> None:
    """What is wrong is named, with the setting, in one line that quotes no password."""
    with pytest.raises(ConfigurationError) as raised:
        receivers.read(written(tmp_path, text))
    assert raised.value.message.startswith("MILLRACE_RECEIVERS_FILE: ")
    assert expected in raised.value.message
    assert "\n" not in raised.value.message
    assert "password" not in raised.value.message


@pytest.mark.parametrize("secret", ["", "\n", "whsec_", "whsec_!", "MDEyMzQ1", "whsec_MDEyMzQ1"])
def test_a_secret_that_cannot_sign_is_refused(tmp_path: Path, secret: str) -> None:
    """A key is 24 to 64 bytes behind `whsec_`; anything else is a wrong setting."""
    (tmp_path / "secret").write_text(secret)
    with pytest.raises(ConfigurationError, match="secret_file"):
        receiver(secret_file=str(tmp_path / "secret")).secrets()


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, True),
        ({"severity": "critical"}, True),
        ({"severity": ["info", "critical"], "host": "node-*"}, True),
        ({"severity": "warning"}, False),
        ({"host": "node"}, False),
        ({"model": "*H100*"}, True),
        ({"namespace": "training"}, True),
        ({"rule": "another"}, False),
        ({"cluster": ""}, True),
        ({"cluster": "?*"}, False),
    ],
)
def test_who_is_told(match: dict[str, Any], expected: bool) -> None:
    """Every label must fit one of its patterns; our own labels cannot be taken over by those of a condition."""
    firing = alert(1, labels={"namespace": "training", "rule": "another"})
    assert receiver(match=match).wants(firing) is expected
    assert not receiver(match=match).wants(msgspec.structs.replace(firing, state="pending"))


def test_the_end_is_told_to_who_wants_it() -> None:
    """`send_resolved: false` leaves the ends of alerts out."""
    over = alert(1, "resolved")
    assert (receiver().wants(over), receiver(send_resolved=False).wants(over)) == (True, False)


def test_a_message_is_the_same_at_every_attempt() -> None:
    """Identity and body follow from receiver and transitions; each attempt is signed anew, by every key."""
    one = alert(1)
    message = Message(id=message_id("on-call", (one,)), alerts=(one,))
    body = messages.body(receiver(), message, NOW)
    assert body == messages.body(receiver(), message, NOW + timedelta(days=1))
    data = json.loads(body)
    assert (data["type"], data["timestamp"]) == ("millrace.gpu.alerts.v1", "2026-11-21T12:02:01Z")
    assert msgspec.convert(data["data"]["alerts"][0], type(one)) == one
    keys = [b"k" * 32, b"l" * 32]
    sent = messages.headers(message, body, keys, NOW)
    assert sent["webhook-id"] == message_id("on-call", (one,))
    signed = f"{message.id}.{sent['webhook-timestamp']}.".encode() + body
    expected = [base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys]
    assert sent["webhook-signature"] == " ".join(f"v1,{each}" for each in expected)
    assert "webhook-signature" not in messages.headers(message, body, [], NOW)
    over = msgspec.structs.replace(one, state="resolved")
    others = {message_id("on-call", (over,)), message_id("chat", (one,)), message_id("on-call", (one, over))}
    assert len(others | {message.id}) == 4


def test_slack_shows_text_and_acts_on_none() -> None:
    """A headline and a block per transition, with what to do next; markup of strangers stays text."""
    firing = alert(1, rule="<!channel> & co")
    message = Message(id="m", alerts=(firing, alert(2, "resolved")))
    sent = json.loads(messages.body(receiver(kind="slack"), message, NOW))
    assert sent["text"] == "[critical] &lt;!channel&gt; &amp; co on node-7 and 1 more"
    first, second = (block["text"]["text"] for block in sent["blocks"])
    assert "*Next: inspect*. Check fans" in first
    assert "over at 12:09:02" in second
    assert "Next" not in second
    assert "<!" not in first


def test_an_alertmanager_gets_labels_and_an_end() -> None:
    """What fires ends unless it is said again; what is over has ended; labels tell one alert from another."""
    firing, over = alert(1, labels={"k8s.pod": "train-0", "0": "x"}), alert(1, "resolved")
    to = receiver(kind="alertmanager", resend_seconds=60)
    sent = json.loads(messages.body(to, Message(id="m", alerts=(firing, over)), NOW))
    assert sent[0]["labels"] == {
        "alertname": "thermal_margin", "rule": "thermal_margin", "severity": "critical", "host": "node-7",
        "gpu_uuid": "GPU-1", "model": "NVIDIA H100 80GB HBM3", "k8s_pod": "train-0",
    }  # fmt: skip
    assert [each["endsAt"] for each in sent] == ["2026-11-21T12:34:00Z", "2026-11-21T12:09:01Z"]
    assert sent[0]["annotations"]["alert_id"] == firing.id
    told = {name: sent[0]["annotations"].get(name) for name in ("description", "action", "runbook")}
    condition = firing.condition
    assert told == {
        "description": condition.message, "action": condition.action, "runbook": condition.runbook,
    }  # fmt: skip
    assert condition.action


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", None), ("30", 30.0), ("-1", None), ("99999999", 3600.0), ("soon", None),
        ("Sat, 21 Nov 2026 12:31:00 GMT", 60.0), ("Sat, 21 Nov 2026 12:00:00 GMT", 0.0),
    ],
)  # fmt: skip
def test_how_long_a_receiver_is_left_alone(given: str, expected: float | None) -> None:
    """Seconds or a date, at most an hour; what cannot be understood is not there."""
    assert retry_after_seconds({"Retry-After": given}, NOW) == expected
