"""What Prometheus is told, that asking costs little and disturbs nothing, and that dashboard and alerts ask for it."""

import asyncio
import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, insert, select

from flows.config import parse
from flows.deliveries import Deliveries
from flows.health import ledger_trouble, watched
from flows.lately import Lately
from flows.metrics import Told, exposition, families
from flows.receiver import PATH, Receiver, application
from flows.waking import Waker
from registry import database
from registry.ledger import Ledger
from registry.measures import WHOLE, Cost, LineFacts
from registry.records import Decision, ExpertState, ExpertVersion, FoldinError, Merge, Refusal
from registry.schema import events, experts
from registry.verdicts import Check, Outcome, Verdict

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((ROOT / "infra/grafana/foldin.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((ROOT / "infra/alerts.yaml").read_text(encoding="utf-8"))["groups"]
CHECK = Check("max_task_drop", "words", 0.01, 0.02, True, "fell by 0.010", "full")
PASSED, HELD = Verdict(Outcome.PASSED, (CHECK,)), Verdict(Outcome.WAITING, (replace(CHECK, passed=False),))


@pytest.fixture
def ledger(tmp_path):
    """A ledger with the lines `demo` and `idle`."""
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}", patience=2.0)
    made.add_line("demo", "b" * 64)
    made.add_line("idle", "c" * 64)
    yield made
    made.close()


def facts(ledger, line="demo"):
    return next(each for each in ledger.measures.look() if each.line == line)


def promoted(ledger, lease, number, expert=None, verdict=PASSED, scores=None):
    """The merge of a version that became champion."""
    merge = Merge(f"{number:064}", "demo", expert and expert.id, number - 1 or None, verdict)
    ledger.record_verdict(lease, merge, scores=scores)
    merge = replace(merge, version=number, manifest_sha256="m" * 64)
    ledger.confirm(lease, ledger.commit(lease, merge))
    return merge


def enrolled(ledger, *versions):
    for version in versions:
        ledger.enrol("demo", ExpertVersion("experts", version), "words")
    return ledger.experts("demo", ExpertState.PENDING)


# what is told


def test_a_line_that_did_nothing_yet(ledger):
    assert facts(ledger, "idle") == LineFacts("idle", None, False, False, False, 0.0, 0.0)


def test_experts_champion_scores_and_verdict_follow_the_ledger(ledger):
    lease = ledger.leases.claim("demo", "me", 60)
    promoted(ledger, lease, 1, verdict=Verdict(Outcome.PASSED))
    first, *_ = enrolled(ledger, 1, 2, 3)
    promoted(ledger, lease, 2, first, scores={"accuracy.words": 0.75, "perplexity.news": 12.5})
    _, second = enrolled(ledger)
    ledger.settle(lease, second, ExpertState.REJECTED, "E_GATE", "no better")
    found = facts(ledger)
    assert (found.champion, found.experts) == (2, {"folded": 1, "pending": 1, "rejected": 1})
    assert 0 < found.oldest_pending < 10
    assert found.events == {"init": 1, "fold": 1}
    assert (found.scores, found.checks) == ({"accuracy.words": 0.75, "perplexity.news": 12.5}, (CHECK,))
    ledger.move(lease, "rollback", 1, "worse", "me")
    found = facts(ledger)
    assert (found.champion, found.scores, found.checks) == (1, {}, (CHECK,)), "scores are the champion's"
    assert found.experts["rolled-back"] == 1


def test_a_lease_has_an_age_and_a_rest_and_a_silent_holder_shows(ledger):
    lease = ledger.leases.claim("demo", "me", 60)
    found = facts(ledger)
    assert found.held
    assert 0 <= found.lease_age < 5 < found.lease_left <= 60
    ledger.leases.renew(lease, -30)
    found = facts(ledger)
    assert not found.held
    assert -40 < found.lease_left <= -30
    ledger.leases.release(lease)
    assert (facts(ledger).lease_age, facts(ledger).lease_left) == (0.0, 0.0)


def test_blocked_and_waiting_end_when_a_person_acts(ledger):
    lease = ledger.leases.claim("demo", "me", 60)
    promoted(ledger, lease, 1)
    (expert,) = enrolled(ledger, 1)
    merge = Merge("k", "demo", expert.id, 1, HELD)
    ledger.record_verdict(lease, merge)
    assert not facts(ledger).waits, "it has no version yet"
    held = replace(merge, version=2, manifest_sha256="m" * 64)
    ledger.hold(lease, held)
    ledger.block(lease, "the alias stands elsewhere")
    assert (facts(ledger).blocked, facts(ledger).waits) == (True, True)
    ledger.block(lease, "")
    ledger.decide(lease, held, Decision.DECLINED, "no", "me")
    assert (facts(ledger).blocked, facts(ledger).waits) == (False, False)


def test_what_steps_took_is_added_up_by_several_processes(ledger, tmp_path):
    other = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    mine = {"fold": Cost(1, 0, 1.5, 10), WHOLE: Cost(1, 1, 2.0)}
    several = [threading.Thread(target=each.measures.add, args=("demo", mine)) for each in (ledger, other) * 3]
    for each in several:
        each.start()
    for each in several:
        each.join()
    other.close()
    assert facts(ledger).steps == {"fold": Cost(6, 0, 9.0, 60), WHOLE: Cost(6, 6, 12.0)}


FULL = LineFacts(
    *("demo", 7, True, False, True, 12.0, 48.0),
    experts={"pending": 3, "folded": 6},
    oldest_pending=90.5,
    events={"fold": 6, "rollback": 1},
    steps={"fold": Cost(8, 1, 20.0, 4096), WHOLE: Cost(9, 2, 60.0)},
    scores={"accuracy.words.en": 0.5},
    checks=(CHECK,),
)
TOLD = Told({"accepted": 4, "refused": 1}, {"demo": 3})


def test_what_is_written_is_what_prometheus_reads_in_both_formats():
    plain, kind = exposition([FULL], TOLD, "")
    assert kind.startswith("text/plain")
    strict, kind = exposition([FULL], TOLD, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    for found in (text_string_to_metric_families(plain.decode()), open_families(strict.decode())):
        samples = {(each.name, *sorted(each.labels.values())): each.value for one in found for each in one.samples}
        assert samples["foldin_experts", "demo", "pending"] == 3
        assert samples["foldin_experts", "demo", "withdrawn"] == 0, "a state that nobody is in is told too"
        assert samples["foldin_score", "accuracy", "demo", "words.en"] == 0.5
        assert samples["foldin_gate_limit", "demo", "full", "max_task_drop", "words"] == 0.02
        assert samples["foldin_step_seconds_sum", "demo", "fold"] == 20
        assert samples["foldin_fold_failures_total", "demo"] == 2
        assert samples["foldin_deliveries_total", "refused"] == 1
        assert samples["foldin_ledger_up",] == 1


def test_a_ledger_that_is_away_is_told_as_that_and_nothing_is_made_up():
    samples = [each for one in families(None, TOLD) for each in one.samples if each.labels.get("line") != "demo"]
    assert {each.name for each in samples} == {"foldin_ledger_up", "foldin_deliveries_total"}
    assert samples[0].value == 0


def test_a_name_of_a_stranger_cannot_write_metrics():
    evil = 'words"} 1\nfoldin_blocked{line="other'
    text = exposition([replace(FULL, scores={f"accuracy.{evil}": 1.0})], Told(), "")[0].decode()
    tasks = [
        each.labels["task"]
        for one in text_string_to_metric_families(text)
        for each in one.samples
        if one.name == "foldin_score"
    ]
    assert tasks == [evil]
    assert len(re.findall("^foldin_blocked{", text, re.MULTILINE)) == 1


# asking


def test_a_large_ledger_is_looked_at_quickly(ledger):
    with database.transaction(ledger._engine) as tx:
        common = {"line": "demo", "model": "experts", "state": "folded", "enrolled": 1.0, "task": "words"}
        tx.execute(insert(experts), [{**common, "version": n, "seq": n, "digest": str(n)} for n in range(10_000)])
        tx.execute(insert(events), [{"line": "demo", "kind": "fold", "done": True, "fence": 1, "at": 1.0}] * 10_000)
    begun = time.monotonic()
    for _ in range(5):
        assert facts(ledger).experts == {"folded": 10_000}
    each = (time.monotonic() - begun) / 5
    print(f"one look at 10,000 experts and events: {each * 1000:.0f} ms")
    assert each < 0.5


def test_a_look_waits_for_no_writer_and_none_for_it(ledger):
    with database.transaction(ledger._engine) as writing:
        writing.execute(insert(experts).values(line="demo", model="m", version=1, seq=1, state="pending", enrolled=0))
        assert facts(ledger).experts == {}, "what is not committed is not seen"
    with database.reading(ledger._engine) as reading:
        assert reading.execute(select(func.count()).select_from(experts)).scalar() == 1
        assert ledger.leases.claim("demo", "me", 60)
        enrolled(ledger, 1)
        assert reading.execute(select(func.count()).select_from(experts)).scalar() == 1, "it sees one moment"


def test_a_storm_is_one_question():
    async def storm():
        asked = []

        async def ask():
            asked.append(1)
            await asyncio.sleep(0.05)
            return len(asked)

        lately = Lately(ask, 0.2)
        first = await asyncio.gather(*(lately() for _ in range(500)))
        again = await lately()
        await asyncio.sleep(0.25)
        return set(first), again, await lately()

    assert asyncio.run(storm()) == ({1}, 1, 2)


def test_who_hangs_up_takes_nobodys_answer_and_a_failure_is_not_for_ever():
    async def trouble():
        answers = iter([FoldinError(Refusal("E_LEDGER", "away")), 7])

        async def ask():
            await asyncio.sleep(0.05)
            answer = next(answers)
            if isinstance(answer, FoldinError):
                raise answer
            return answer

        lately = Lately(ask, 0.0)
        gone = asyncio.create_task(lately())
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(FoldinError):
            await lately()
        await asyncio.sleep(0.01)
        return await lately()

    assert asyncio.run(trouble()) == 7


# the receiver's pages

LINES = """
[lines.demo]
base = "base"
experts = ["experts"]
[lines.idle]
base = "base"
experts = ["more"]
trigger = "manual"
"""


class Prefect:
    """An API that knows some deployments, or does not answer."""

    def __init__(self, *deployments, silent=False):
        self._deployments, self._silent = deployments, silent

    async def api_healthcheck(self):
        if self._silent:
            await asyncio.sleep(60)

    async def read_deployments(self, **filters):
        if self._silent:
            raise httpx.ConnectError("no address of mine: http://user:password@prefect")
        return [type("Deployment", (), {"name": each}) for each in self._deployments]


def asked(tmp_path, ledger, prefect, *paths):
    """(answers of the real application to GET of some paths, seconds it took)."""

    async def ask():
        config = parse(LINES, tmp_path / "foldin.toml")
        deliveries = Deliveries((b"a secret of sixteen",))
        app = application(config, deliveries, ledger)
        app.state.receiver = Receiver(config, deliveries, Waker(None), {}.get)
        app.state.lines, app.state.troubles = watched(config, ledger, prefect)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client:
            await client.post(PATH, content=b"forged")
            return [await client.get(path) for path in paths]

    begun = time.monotonic()
    return asyncio.run(ask()), time.monotonic() - begun


def test_the_metrics_of_a_receiver_are_those_of_the_ledger_and_its_own(tmp_path, ledger):
    ledger.block(ledger.leases.claim("demo", "me", 60), "somebody moved the alias")
    (answer,), _ = asked(tmp_path, ledger, Prefect(), "/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert 'foldin_blocked{line="demo"} 1.0' in answer.text
    assert 'foldin_deliveries_total{answer="refused"} 1.0' in answer.text
    assert 'foldin_deliveries_total{answer="accepted"} 0.0' in answer.text
    assert 'foldin_wakes_total{line="demo"} 0.0' in answer.text


def test_a_ledger_that_keeps_one_waiting_does_not_keep_the_receiver(tmp_path, ledger, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(ledger.measures, "look", lambda: ended.wait(20))
    monkeypatch.setattr(ledger.measures, "answers", lambda: ended.wait(20))
    threading.Timer(4.0, ended.set).start()  # the loop waits for its threads at its end
    answers, _ = asked(tmp_path, ledger, Prefect("demo"), "/metrics", "/readyz", "/healthz")
    assert [each.status_code for each in answers] == [200, 503, 200]
    assert "foldin_ledger_up 0.0" in answers[0].text
    assert answers[1].json() == {"ready": False, "troubles": {"ledger": "no answer within 1.5 s"}}
    assert all(each.elapsed.total_seconds() < 2 for each in answers)


def test_ready_is_who_can_be_woken(tmp_path, ledger):
    (answer,), _ = asked(tmp_path, ledger, Prefect("demo"), "/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "troubles": {}})
    (answer,), _ = asked(tmp_path, ledger, Prefect("idle"), "/readyz")
    assert (answer.status_code, answer.json()["troubles"]) == (503, {"deployments": "missing: watch/demo"})


def test_not_ready_says_what_and_nothing_secret(tmp_path, ledger):
    (answer,), seconds = asked(tmp_path, ledger, Prefect(silent=True), "/readyz")
    wrong = {"prefect": "no answer within 1.5 s", "deployments": "Prefect does not answer (ConnectError)"}
    assert (answer.status_code, answer.json()["troubles"]) == (503, wrong)
    assert seconds < 5


def test_a_ledger_in_trouble_is_told_by_its_code():
    class Threads:
        async def run(self, ask):
            raise FoldinError(Refusal("E_LEDGER", "the ledger cannot be used", "postgresql://foldin:secret@db/foldin"))

    assert asyncio.run(ledger_trouble(Threads(), None)) == "E_LEDGER: the ledger cannot be used"


# who asks for it

EMITTED = {
    sample: {label for each in family.samples if each.name == sample for label in each.labels}
    for family in families([FULL], TOLD)
    for sample in {each.name for each in family.samples}
}


def expressions():
    """(where, PromQL) of every panel and every alert."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], re.sub(r"\$__\w+", "5m", target["expr"])
    for group in ALERTS:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def selectors(expression):
    """(metric, label matchers) of all that an expression asks for; ValueError when it is no PromQL."""
    found = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, node.matchers.matchers))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_dashboard_and_alerts_ask_for_what_there_is(where, expression):
    known = {**EMITTED, "up": {"job"}}
    asked_for = selectors(expression)
    assert asked_for
    for metric, matchers in asked_for:
        assert metric in known
        assert {each.name for each in matchers} <= known[metric]


def test_what_is_no_promql_would_be_found():
    with pytest.raises(ValueError, match="paren"):
        selectors("sum(rate(foldin_events_total[5m])")


def test_every_metric_is_on_the_dashboard_or_in_an_alert():
    shown = {metric for _, expression in expressions() for metric, _ in selectors(expression)}
    assert set(EMITTED) - shown == set()


def test_the_dashboard_is_one_that_grafana_takes():
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh"} <= DASHBOARD.keys()
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "line": "query"}
    panels, taken = DASHBOARD["panels"], set()
    assert len({each["id"] for each in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            sources = [panel["datasource"], *(each["datasource"] for each in panel["targets"])]
            assert all(each == {"type": "prometheus", "uid": "${datasource}"} for each in sources)
            assert len({each["refId"] for each in panel["targets"]}) == len(panel["targets"])


def test_prometheus_scrapes_the_receiver_and_reads_the_alerts():
    found = yaml.safe_load((ROOT / "infra/prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = found["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("foldin", "/metrics")
    assert all((ROOT / "infra" / name).exists() for name in found["rule_files"])
    rules = [rule for group in ALERTS for rule in group["rules"]]
    assert all({"alert", "expr", "labels", "annotations"} <= rule.keys() for rule in rules)
    assert all(rule["alert"] in DOCUMENT for rule in rules)


def test_every_metric_is_documented_and_nothing_else():
    rows = re.findall(r"^\| `(foldin_\w+)` \|([^|]*)\|", DOCUMENT, re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert documented == {name.removesuffix("_sum").removesuffix("_count"): labels for name, labels in EMITTED.items()}
