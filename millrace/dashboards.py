"""Grafana dashboards from k8s/strimzi/dashboards/*.yaml, which say what panels ask and tell and no more.

`python -m millrace.dashboards`, or `make dashboards`, writes the JSON beside each file. Every panel has a title, a
unit and words on what to do about it; the data source and the namespace are variables.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "k8s" / "strimzi" / "dashboards"
# Grafana 11's; later ones read it and write their own.
SCHEMA_VERSION = 39
_COLUMNS = 24
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]


def sources() -> list[Path]:
    """Return what dashboards are made from."""
    return sorted(file for file in FOLDER.glob("*.yaml") if file.stem != "kustomization")


def render(source: Path) -> str:
    """Return a dashboard as Grafana imports it."""
    return (
        json.dumps(_dashboard(yaml.safe_load(source.read_text("utf-8"))), indent=1, ensure_ascii=False) + "\n"
    )


def _dashboard(said: Json) -> Json:
    return {
        "uid": said["uid"],
        "title": f"Millrace / {said['title']}",
        "description": said["description"],
        "tags": ["millrace"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_alerts()]},
        "links": [
            {"type": "dashboards", "title": "Millrace", "tags": ["millrace"], "asDropdown": True, "keepTime": True,
             "includeVars": True, "icon": "external link", "targetBlank": False, "tooltip": ""}
        ],
        "templating": {"list": [*_variables(), *map(_constant, said.get("constants", []))]},
        "panels": list(_panels(said["rows"])),
    }  # fmt: skip


def _panels(rows: list[Json]) -> Iterator[Json]:
    """Lay panels out from left to right, row by row."""
    number = y = 0
    for row in rows:
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
        yield {
            "id": number,
            "type": "row",
            "title": row["row"],
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        x, y = 0, y + 1
        for said in row["panels"]:
            number += 1
            width = said.get("width", 8)
            if x + width > _COLUMNS:
                x, y = 0, y + _HEIGHT
            place = {"h": _HEIGHT, "w": width, "x": x, "y": y}
            yield {"id": number, "gridPos": place, **_panel(said)}
            x += width
        y += _HEIGHT


def _panel(said: Json) -> Json:
    kind = said.get("show", "lines")
    defaults: Json = {"unit": said["unit"], "color": {"mode": "palette-classic"}}
    defaults |= {limit: said[limit] for limit in ("min", "max", "decimals") if limit in said}
    steps = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": value} for color, value in said.get("thresholds", {}).items()]
    if kind == "stat":
        defaults["color"] = {"mode": "thresholds"}
        options: Json = {
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "graphMode": "area",
            "colorMode": "value",
        }
    else:
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if kind == "stacked" else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if kind == "stacked" else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if "thresholds" in said else "off"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    return {
        "type": "stat" if kind == "stat" else "timeseries",
        "title": said["title"],
        "description": said["help"],
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _SOURCE, "editorMode": "code", "range": True,
             "expr": " ".join(query.split()), "legendFormat": legend}
            for number, (legend, query) in enumerate(said["queries"].items())
        ],
    }  # fmt: skip


def _variables() -> list[Json]:
    """Return the variables of every dashboard; on one machine, where nothing has a namespace, all is everything."""
    query = "label_values(process_start_time_seconds, namespace)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0},
        {
            "name": "namespace", "label": "Namespace", "type": "query", "datasource": _SOURCE, "definition": query,
            "query": {"query": query, "refId": "namespace"}, "refresh": 2, "sort": 1, "multi": True,
            "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "hide": 0,
        },
    ]  # fmt: skip


def _constant(said: Json) -> Json:
    """Return a number that whoever looks may change."""
    current = {"text": str(said["value"]), "value": str(said["value"])}
    return {
        "name": said["name"], "label": said["label"], "type": "textbox", "query": str(said["value"]),
        "current": current, "options": [{**current, "selected": True}], "hide": 0,
    }  # fmt: skip


def _alerts() -> Json:
    return {
        "name": "Alerts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{app="millrace", alertstate="firing", namespace=~"$namespace"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}}",
        "step": "60s",
    }


def main() -> int:
    """Write every dashboard beside what it is made from."""
    for source in sources():
        source.with_suffix(".json").write_text(render(source), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
