# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/monitoring: every name in the dashboard and the alert rules exists, and Prometheus understands both."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replicator import metrics
from tests.lab.prometheus import TOOL

MONITORING = Path(__file__).parents[2] / "docs/monitoring"
RULES, DASHBOARD = MONITORING / "alerts.yml", MONITORING / "dashboard.json"
_NAME = re.compile(r"\b(?:dpvs|process)_[a-z_]+")
_LABELS = re.compile(r"(\b(?:dpvs|process)_[a-z_]+)\{([^}]*)\}")
FROM_PROMETHEUS = {"instance", "job"}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> Iterator[str]:
    """Every expression of the dashboard, its variables filled in as Grafana would."""
    for panel in panels():
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")


def expressions() -> Iterator[str]:
    """Every expression of the alert rules; a value may go on in deeper lines."""
    lines = RULES.read_text().splitlines()
    for at, line in enumerate(lines):
        if line.strip().startswith("expr:"):
            value = line.split("expr:", 1)[1].strip()
            if value == ">-":
                indent = len(line) - len(line.lstrip())
                below = []
                for other in lines[at + 1 :]:
                    if len(other) - len(other.lstrip()) <= indent:
                        break
                    below.append(other.strip())
                value = " ".join(below)
            yield value


def plain(name: str) -> str:
    """The metric of a sample."""
    for ending in ("_bucket", "_count", "_sum"):
        if name.removesuffix(ending) in metrics.NAMES:
            return name.removesuffix(ending)
    return name


@pytest.mark.parametrize("source", [queries, expressions])
def test_every_name_and_label_is_one_that_is_shown(source: Any) -> None:
    found = list(source())
    assert len(found) > 10
    known = set(metrics.NAMES) | set(metrics.PROCESS_NAMES)
    for expression in found:
        used = [plain(name) for name in _NAME.findall(expression)]
        for name in used:
            assert name in known, f"{name} in {expression}"
        for name, labels in _LABELS.findall(expression):
            kind = metrics.NAMES.get(plain(name))
            own = set(kind.labels) if kind else set()
            for label in re.findall(r"([a-z_]+)\s*[=!]", labels):
                assert label in own | FROM_PROMETHEUS, f"{label} of {name} in {expression}"


def test_what_an_operator_alerts_on_is_alerted_on() -> None:
    text = " ".join(expressions())
    for name in ("dpvs_sync_delay", "dpvs_sync_failures_total", "dpvs_sync_link_up", "dpvs_injection_stopped",
                 "dpvs_probe_events_lost_total", "dpvs_sync_resyncs_total"):  # fmt: skip
        assert name in text
    shown = {plain(name) for query in queries() for name in _NAME.findall(query)}
    for name in ("dpvs_sessions", "dpvs_probe_worker_time_ratio", "dpvs_probe_scan_seconds_total",
                 "dpvs_injections_total", "process_resident_memory_bytes", "dpvs_probe_hits_total"):  # fmt: skip
        assert name in shown


def test_the_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


def promtool(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run([TOOL, *arguments], input=text, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.needs("prometheus")
def test_promtool_takes_the_rules_and_every_query_of_the_dashboard(tmp_path: Path) -> None:
    assert f"SUCCESS: {len(list(expressions()))} rules found" in promtool("check", "rules", str(RULES))
    recorded = [{"record": f"panel:query:{n}", "expr": query} for n, query in enumerate(queries())]
    file = tmp_path / "dashboard.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}))  # JSON is YAML
    assert f"SUCCESS: {len(recorded)} rules found" in promtool("check", "rules", str(file))


@pytest.mark.needs("prometheus")
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    up = 'dpvs_sync_link_up{instance="a",direction="to",peer="b:1"}'
    delay = 'dpvs_sync_delay{instance="a",peer="b:1"}'
    failed = 'dpvs_sync_failures_total{instance="a",direction="to",peer="b:1",reason="%s"}'

    def case(series: dict[str, str], **fires: int) -> dict[str, Any]:
        names = ("DpvsSyncLinkDown", "DpvsSyncDelayed", "DpvsSyncFailing", "DpvsInjectionStopped", "DpvsProbeDown",
                 "DpvsProbeNotAttached", "DpvsProbeEventsLost")  # fmt: skip
        shown = [{"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})', "eval_time": "12m",
                  "exp_samples": [{"value": 1}] if name in fires else []} for name in names]  # fmt: skip
        return {"interval": "15s", "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": shown}  # fmt: skip

    tests = [
        case({up: "1x60", delay: "0.01x60", failed % "reset": "3x60"}),
        case({up: "1x10 0x50", delay: "0x10 0+15x50"}, DpvsSyncLinkDown=1),
        case({up: "1x60", delay: "0x10 2x50"}, DpvsSyncDelayed=1),
        case({failed % "unreachable": "0+1x60", failed % "ended": "0+1x60"}, DpvsSyncFailing=1),
        case({'dpvs_agent_state{instance="a",state="poisoned"}': "1x60"}, DpvsInjectionStopped=1),
        case({'up{job="dpvs-probe",instance="a"}': "0x60", 'up{job="other"}': "0x60"}, DpvsProbeDown=1),
        case({'dpvs_probe_attached{instance="a"}': "0x60"}, DpvsProbeNotAttached=1),
        case({'dpvs_probe_events_lost_total{instance="a"}': "0x40 5x20"}, DpvsProbeEventsLost=1),
    ]
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "15s", "tests": tests}))
    promtool("test", "rules", str(file))
