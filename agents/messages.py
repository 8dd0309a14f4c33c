"""What receivers are sent: bodies, headers and identities of messages. No I/O.

A message tells one receiver of one or more transitions of alerts. Its identity is made from them and from the
receiver's name (`pipeline/notifications.py`), its body from nothing else but, for an Alertmanager, the time: every
attempt to deliver it is the same message, and a receiver that got it twice can tell by `webhook-id`.
"""

import base64
import hmac
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from pipeline.notifications import Message
from pipeline.receivers import Receiver, labels_of
from pipeline.telemetry import Alert

EVENT_TYPE = "millrace.gpu.alerts.v1"
# Standard Webhooks 1.0.0 wants payloads below 20 kB; an alert is about 800 bytes.
MAX_ALERTS = 20
MAX_ALERTS_OF_ALERTMANAGER = 100
# Slack: 3,000 characters of text in a block, 50 blocks, and beyond that the message is refused.
_MAX_SLACK_CHARACTERS = 2_900
_LABEL_NAME = re.compile(r"[^A-Za-z0-9_]")
_MARKS = {"critical": ":red_circle:", "warning": ":large_orange_circle:", "info": ":large_blue_circle:"}
# An alert that is the same may change in these.
_CHANGING = frozenset({"action", "field"})
# An Alertmanager takes an alert as over when it was not repeated for so many of our intervals.
RESENDS_UNTIL_OVER = 4

_encoder = msgspec.json.Encoder()


def most_alerts(receiver: Receiver) -> int:
    """Return how many transitions one message may have."""
    return MAX_ALERTS_OF_ALERTMANAGER if receiver.kind == "alertmanager" else MAX_ALERTS


def body(receiver: Receiver, message: Message, now: datetime) -> bytes:
    """Return what is posted; `now` counts for an Alertmanager alone."""
    if receiver.kind == "slack":
        return _encoder.encode(_slack(message))
    if receiver.kind == "alertmanager":
        return _encoder.encode([_posted(receiver, alert, now) for alert in message.alerts])
    return _encoder.encode(
        {
            "type": EVENT_TYPE,
            "timestamp": max(alert.time for alert in message.alerts),
            "data": {
                "receiver": receiver.name,
                "group": receiver.group_labels(message.alerts[0]),
                "alerts": message.alerts,
            },
        }
    )


def headers(message: Message, payload: bytes, keys: Sequence[bytes], now: datetime) -> dict[str, str]:
    """Return the headers of one attempt, as Standard Webhooks 1.0.0 says."""
    timestamp = str(int(now.timestamp()))
    named = {
        "content-type": "application/json",
        "webhook-id": message.id,
        "webhook-timestamp": timestamp,
    }
    if keys:
        signed = b".".join((message.id.encode(), timestamp.encode(), payload))
        named["webhook-signature"] = " ".join(f"v1,{_signature(key, signed)}" for key in keys)
    return named


def _signature(key: bytes, signed: bytes) -> str:
    return base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def _slack(message: Message) -> dict[str, Any]:
    """Return a message of Slack's incoming webhooks: a line that is read out, and a block per transition."""
    first = message.alerts[0]
    headline = _headline(first)
    if len(message.alerts) > 1:
        headline += f" and {len(message.alerts) - 1} more"
    blocks = [
        {"type": "section", "text": {"type": "mrkdwn", "text": _block(alert)}} for alert in message.alerts
    ]
    return {"text": headline, "blocks": blocks}


def _headline(alert: Alert) -> str:
    state = "resolved" if alert.state == "resolved" else alert.condition.severity
    return _escaped(f"[{state}] {alert.condition.rule} on {alert.host}")


def _block(alert: Alert) -> str:
    condition = alert.condition
    mark = ":white_check_mark:" if alert.state == "resolved" else _MARKS[condition.severity]
    lines = [f"{mark} *{_headline(alert)}*", _escaped(condition.message)]
    facts = [
        f"GPU `{_escaped(alert.gpu_uuid)}`",
        f"since {alert.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC",
    ]
    if alert.state == "resolved":
        facts.append(f"over at {alert.time.astimezone(UTC):%H:%M:%S}")
    lines.append(", ".join(facts))
    if alert.state == "firing" and condition.action:
        lines.append(f"*Next: {_escaped(condition.action)}*. {_escaped(condition.runbook or '')}".rstrip())
    return "\n".join(line for line in lines if line)[:_MAX_SLACK_CHARACTERS]


def _escaped(text: str) -> str:
    """Return text that Slack shows and does not act on."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _posted(receiver: Receiver, alert: Alert, now: datetime) -> dict[str, Any]:
    """Return an alert as `POST /api/v2/alerts` takes it; labels are its identity there."""
    condition = alert.condition
    named = {_LABEL_NAME.sub("_", name): value for name, value in labels_of(alert).items()}
    labels = {
        name: value
        for name, value in named.items()
        if value and name not in _CHANGING and not name[0].isdigit()
    }
    annotations = {
        "summary": f"{condition.rule} on {alert.host}",
        "description": condition.message,
        "action": condition.action,
        "runbook": condition.runbook,
        "value": None if condition.value is None else f"{condition.value:g}",
        "limit": None if condition.limit is None else f"{condition.limit:g}",
        "alert_id": alert.id,
    }
    expires = now + timedelta(seconds=receiver.resend_seconds * RESENDS_UNTIL_OVER)
    return {
        "labels": labels | {"alertname": condition.rule},
        "annotations": {name: value for name, value in annotations.items() if value},
        "startsAt": alert.since,
        "endsAt": alert.time if alert.state == "resolved" else expires,
    }
