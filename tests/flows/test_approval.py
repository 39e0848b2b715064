"""People decide: what waits, what they say, what a rollback makes of it, and that no death leaves it half done."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from experiments.plain_client import champion, move_alias, register_expert
from flows.config import load
from flows.doctor import examine
from flows.processes import free_port
from flows.reading import log, show, status
from flows.serve import prefect_server
from flows.versions import STATE_FOLDER
from flows.wiring import artifact_root, house, tracking_uri
from registry.records import FoldinError
from registry.verdicts import Outcome
from tests.flows.patience import marked, wait_until

pytestmark = pytest.mark.integration


class Desk:
    """A line whose experts wait for a person, and what can be asked of it."""

    def __init__(self, toml):
        self.toml = toml
        self.reopen()

    def reopen(self):
        """What the configuration says now."""
        house.cache_clear()
        self.at = house(str(self.toml))
        return self

    def set(self, **settings):
        """Other settings of the line."""
        text = self.toml.read_text()
        rows = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        self.toml.write_text(text.replace("interval = 3600.0", f"interval = 3600.0\n{rows}"))
        return self.reopen()

    def rule(self, old, new):
        """Another gate rule."""
        self.toml.write_text(self.toml.read_text().replace(old, new))
        return self.reopen()

    def register(self, folder, task):
        config = self.at.config
        return register_expert(tracking_uri(config), "tiny-experts", folder, task, artifact_root(config))

    def watch(self):
        from flows.watch import watch

        return [(each["expert"][-2:], each["state"], each["version"]) for each in watch("tiny", str(self.toml))]

    def decide(self, verb, version, because="it is good", who="ann"):
        from flows import approval

        return getattr(approval, verb)("tiny", version, because, who, str(self.toml))

    def rollback(self, to):
        from flows.rollback import rollback

        return rollback("tiny", "a test", to, "ann", str(self.toml))

    @property
    def champion(self):
        """Where ledger and MLflow agree that the champion is."""
        seen = champion(tracking_uri(self.at.config), "tiny")
        assert seen == self.at.ledger.line("tiny").champion
        return seen

    @property
    def states(self):
        return [str(expert.state) for expert in self.at.ledger.experts("tiny")]

    @property
    def kinds(self):
        return [event.kind for event in self.at.ledger.events("tiny")]

    def shown(self, version):
        """What an MLflow client sees of a version: verdict, who, why, and whether it is the candidate."""
        tags = self.at.mlflow.expert("tiny", version).tags
        keys = ("foldin.verdict", "foldin.decided_by", "foldin.because")
        return (*(tags.get(key) for key in keys), self.at.mlflow.candidate("tiny") == version)


@pytest.fixture
def desk(workshop, prefect):
    found = Desk(workshop / "foldin.toml").set(approval="always")
    yield found
    found.at.ledger.close()


def test_what_passed_waits_and_the_line_with_it_until_a_person_approves(desk, zoo):
    for number in (1, 2):
        desk.register(zoo / f"expert-{number}", f"task-{number}")
    assert desk.watch() == [("v1", "needs-approval", 2)]
    assert desk.watch() == []
    assert (desk.champion, desk.states, desk.kinds) == (1, ["pending", "pending"], ["init", "waiting"])
    assert desk.shown(2) == ("needs-approval", None, None, True)
    facts = status(desk.at, "tiny")["waiting"]
    assert (facts["version"], facts["expert"]) == (2, "tiny-experts v1")
    assert abs(facts["since"] - time.time()) < 120
    assert examine(desk.at) == []
    assert desk.decide("approve", 2)["state"] == "approved"
    assert (desk.champion, desk.states) == (2, ["folded", "pending"])
    assert desk.shown(2) == ("approved", "ann", "it is good", False)
    move = desk.at.ledger.events("tiny")[-1]
    assert (move.kind, move.origin, move.target, move.who, move.because, move.done) == (
        *("approved", 1, 2, "ann", "it is good"),
        True,
    )
    assert show(desk.at, "tiny", 2)["verdict"] == "approved"
    assert show(desk.at, "tiny", 2)["decided"]["who"] == "ann"
    assert desk.watch() == [("v2", "needs-approval", 3)]  # in order, one after the other
    assert examine(desk.at) == []


def test_what_a_person_declines_is_rejected_and_the_next_expert_is_folded(desk, zoo):
    for number in (1, 2):
        desk.register(zoo / f"expert-{number}", f"task-{number}")
    desk.watch()
    assert desk.decide("reject", 2, "it is odd", "bob")["state"] == "declined"
    assert (desk.champion, desk.states) == (1, ["rejected", "pending"])
    expert = desk.at.ledger.experts("tiny")[0]
    assert (expert.code, expert.reason) == ("E_DECLINED", "bob declined v2: it is odd")
    assert desk.shown(2) == ("declined", "bob", "it is odd", False)
    assert desk.watch() == [("v2", "needs-approval", 3)]
    assert [(node["version"], node["state"]) for node in log(desk.at, "tiny")["versions"]] == [
        *((1, "passed"), (2, "declined"), (3, "needs-approval"))
    ]
    with pytest.raises(FoldinError, match=r"E_GATE tiny v2: the version did not pass its gate"):
        desk.rollback(2)
    with pytest.raises(FoldinError, match=r"E_GATE tiny v3: no person has approved the version"):
        desk.rollback(3)
    desk.decide("approve", 3)
    assert desk.champion == 3
    desk.rollback(1)
    desk.rollback(3)  # what was approved may serve again
    assert (desk.champion, desk.states) == (3, ["rejected", "folded"])


def test_a_decision_is_taken_once(desk, zoo, capsys):
    desk.register(zoo / "expert-1", "task-1")
    desk.watch()
    desk.decide("reject", 2, "it is odd", "bob")
    before = desk.at.ledger.events("tiny")
    assert desk.decide("reject", 2, "again", "eve")["state"] == "declined"
    assert desk.at.ledger.events("tiny") == before
    with pytest.raises(
        FoldinError, match=r"E_DECIDED tiny v2: .*Found declined by bob: it is odd\. Register the exper"
    ):
        desk.decide("approve", 2)
    with pytest.raises(FoldinError, match=r"E_DECIDED tiny v1: no person was asked about the version\. Found passed"):
        desk.decide("approve", 1)
    with pytest.raises(FoldinError, match=r"E_VERSION tiny v7"):
        desk.decide("reject", 7)
    # As the remedy says: the same weights, registered again, wait again.
    desk.register(zoo / "expert-1", "task-1")
    assert desk.watch() == [("v2", "needs-approval", 3)]
    desk.decide("approve", 3)
    assert (desk.champion, desk.states) == (3, ["rejected", "folded"])
    with pytest.raises(FoldinError, match=r"E_DECIDED tiny v3: .*Found approved by ann.*Roll back with"):
        desk.decide("reject", 3)
    assert desk.watch() == []


def test_a_damaged_candidate_can_be_rejected_and_not_approved(desk, zoo):
    desk.register(zoo / "expert-1", "task-1")
    desk.watch()
    state = next((desk.at.mlflow.folder("tiny", 2) / STATE_FOLDER).glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FoldinError, match=r"E_DIGEST .*file foldin/state/"):
        desk.decide("approve", 2)
    assert (desk.champion, desk.states, desk.kinds) == (1, ["pending"], ["init", "waiting"])
    desk.decide("reject", 2)
    assert desk.states == ["rejected"]


@pytest.mark.chaos
def test_on_reject_asks_only_about_what_a_soft_rule_rejected(desk, zoo):
    desk.rule('approval = "always"', 'approval = "on-reject"')
    desk.register(zoo / "expert-1", "task-1")
    assert desk.watch() == [("v1", "folded", 2)]
    desk.rule("min_gain = -1.0", "min_gain = 0.9")
    desk.register(zoo / "expert-2", "task-2")
    assert desk.watch() == [("v2", "needs-approval", 3)]
    assert "task-2" in status(desk.at, "tiny")["waiting"]["reason"]
    desk.decide("approve", 3, "we need it")
    assert desk.champion == 3
    # What an early rung refused was not measured in full, and nobody can wave it through.
    desk.rule("min_gain = 0.9", "min_gain = -1.0").rule("min_expert_gain = -1.0", "min_expert_gain = 0.9")
    desk.register(zoo / "expert-3", "task-3")
    assert desk.watch() == [("v3", "rejected", None)]
    assert desk.champion == 3
    assert [str(merge.verdict.outcome) for merge in desk.at.ledger.merges("tiny")][-1] == Outcome.REJECTED
    # The line goes on from what a person approved.
    desk.rule("min_expert_gain = 0.9", "min_expert_gain = -1.0")
    desk.register(zoo / "expert-4", "task-4")
    assert desk.watch() == [("v4", "folded", 4)]


@pytest.mark.chaos
def test_a_rollback_goes_on_while_a_version_waits_and_supersedes_it(desk, zoo):
    desk.register(zoo / "expert-1", "task-1")
    desk.watch()
    desk.decide("approve", 2)
    desk.register(zoo / "expert-2", "task-2")
    desk.watch()
    desk.rollback(1)
    assert (desk.champion, desk.states) == (1, ["rolled-back", "pending"])
    with pytest.raises(FoldinError, match=r"E_SUPERSEDED tiny v3: .*Expected champion v2\. Found champion v1"):
        desk.decide("approve", 3)
    assert desk.watch() == [("v2", "needs-approval", 4)]
    assert desk.shown(3) == ("superseded", None, None, False)
    assert desk.shown(4) == ("needs-approval", None, None, True)
    assert [node["state"] for node in log(desk.at, "tiny")["versions"]][2:] == ["superseded", "needs-approval"]
    desk.rollback(2)  # and back: the first of the two is the champion's child again
    assert desk.watch() == []
    assert desk.shown(3) == ("needs-approval", None, None, True)
    assert desk.shown(4)[::3] == ("superseded", False)
    desk.decide("approve", 3)
    assert (desk.champion, desk.states) == (3, ["folded", "folded"])
    assert examine(desk.at) == []


def test_an_alias_that_a_person_put_on_an_undecided_version_blocks_the_line(desk, zoo):
    desk.register(zoo / "expert-1", "task-1")
    desk.watch()
    move_alias(tracking_uri(desk.at.config), "tiny", 2)
    assert desk.watch() == []
    assert "no person has approved the version" in desk.at.ledger.line("tiny").blocked
    with pytest.raises(FoldinError, match=r"E_BLOCKED line tiny"):
        desk.decide("approve", 2)
    move_alias(tracking_uri(desk.at.config), "tiny", 1)
    desk.decide("approve", 2)
    assert desk.champion == 2


def test_the_verbs_say_what_waits_and_what_was_decided(desk, zoo, verbs):
    foldin = verbs(desk.toml)
    desk.register(zoo / "expert-1", "task-1")
    code, out, _ = foldin("watch", "tiny")
    assert (code, out) == (0, "tiny-experts v1: needs-approval as v2\n")
    code, out, said = foldin("watch", "tiny")
    assert (code, out) == (0, "")
    assert said.count("waits for a person since") == 1
    assert "foldin approve tiny 2 --because" in said
    code, out, said = foldin("merge", "tiny")
    assert (code, out, said.count("waits for a person since")) == (0, "", 1)
    assert "tiny v2 (tiny-experts v1) waits for a person since" in foldin("status")[1]
    assert "v2  + task-1  (tiny-experts v1)  waits for a person" in foldin("log", "tiny")[1]
    assert json.loads(foldin("status", "--json")[1])[0]["waiting"]["version"] == 2
    assert foldin("approve", "tiny", 2, "--because", " ")[0] == 2
    code, out, said = foldin("approve", "tiny", 2, "--because", "it is \x1b[31mgood")
    assert (code, out) == (0, "tiny: v2 approved\n")
    code, _, said = foldin("approve", "tiny", 2, "--because", "it is good")
    assert code == 0
    assert "tiny v2 was approved before; nothing changes" in said
    code, _, said = foldin("reject", "tiny", 2, "--because", "no")
    assert code == 1
    assert "E_DECIDED tiny v2" in said
    shown = foldin("show", "tiny", 2)[1]
    assert "approved by " in shown
    assert "\x1b[31m" not in shown


KILLED = """
import functools, importlib, os, signal, sys
module, path, when, *arguments = sys.argv[1:]
*owners, name = path.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
original = getattr(owner, name)
def last(*given, **named):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    original(*given, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, last)
from flows.cli import main
main(arguments)
"""
STORE = "registry.mlflow_store"


def die(desk, point, *arguments):
    """One verb as a process that dies at a point."""
    command = [sys.executable, "-c", KILLED, *point, *arguments]
    died = subprocess.run(command, cwd=desk.toml.parent, capture_output=True, text=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr


@pytest.mark.parametrize(
    ("verb", "point"),
    [
        ("approve", ("registry.ledger", "Ledger.decide", "after")),
        pytest.param("reject", ("registry.ledger", "Ledger.decide", "after"), marks=pytest.mark.chaos),
        pytest.param("approve", (STORE, "MlflowStore.point_candidate", "before"), marks=pytest.mark.chaos),
        pytest.param("approve", ("registry.ledger", "Ledger.decide", "before"), marks=pytest.mark.chaos),
        pytest.param("approve", (STORE, "MlflowStore.point_champion", "after"), marks=pytest.mark.chaos),
        pytest.param("reject", (STORE, "MlflowStore.label", "after"), marks=pytest.mark.chaos),
    ],
    ids=str,
)
def test_killed_at_any_step_of_a_decision_the_next_watch_finishes_it(desk, zoo, verb, point):
    desk.register(zoo / "expert-1", "task-1")
    assert desk.watch() == [("v1", "needs-approval", 2)]
    die(desk, point, verb, "tiny", "2", "--because", "it is good")
    assert desk.watch() == []
    assert examine(desk.at) == []
    if point[1:] == ("Ledger.decide", "before"):
        assert (desk.champion, desk.shown(2)) == (1, ("needs-approval", None, None, True))
        desk.decide(verb, 2)
    decision = {"approve": "approved", "reject": "declined"}[verb]
    assert desk.decide(verb, 2)["state"] == decision
    verdict, who, because, candidate = desk.shown(2)
    assert (verdict, bool(who), because, candidate) == (decision, True, "it is good", False)
    assert (desk.champion, desk.states) == ((2, ["folded"]) if verb == "approve" else (1, ["rejected"]))
    assert desk.kinds == ["init", "waiting", decision]
    assert all(event.done for event in desk.at.ledger.events("tiny"))
    assert desk.at.mlflow.versions("tiny") == [1, 2]
    assert examine(desk.at) == []


@pytest.mark.parametrize(
    "point",
    [
        ("registry.ledger", "Ledger.hold", "after"),
        pytest.param(("registry.ledger", "Ledger.hold", "before"), marks=pytest.mark.chaos),
        pytest.param((STORE, "MlflowStore.point_candidate", "before"), marks=pytest.mark.chaos),
    ],
    ids=str,
)
@pytest.mark.chaos
def test_killed_while_a_version_begins_to_wait_it_waits_once(desk, zoo, point):
    desk.register(zoo / "expert-1", "task-1")
    die(desk, point, "watch", "tiny")
    desk.watch()
    assert (desk.champion, desk.states, desk.kinds) == (1, ["pending"], ["init", "waiting"])
    assert desk.at.mlflow.versions("tiny") == [1, 2]
    assert desk.shown(2) == ("needs-approval", None, None, True)
    assert list(desk.at.work("tiny").glob("*")) == []
    assert examine(desk.at) == []


def test_an_approval_that_was_overtaken_by_a_rollback_moves_nothing(desk, zoo, monkeypatch):
    desk.register(zoo / "expert-1", "task-1")
    desk.watch()
    from flows import approval

    original = approval.verified

    def rolled_back_meanwhile(*arguments, **keywords):
        desk.rollback(1)
        return original(*arguments, **keywords)

    monkeypatch.setattr(approval, "verified", rolled_back_meanwhile)
    with pytest.raises(FoldinError, match="E_FENCED"):
        desk.decide("approve", 2)
    assert (desk.champion, desk.states) == (1, ["pending"])


# Notifications.


@pytest.fixture
def postbox():
    """A web server that keeps what is posted to it: its URL, and the posts."""
    posts = []

    class Postbox(BaseHTTPRequestHandler):
        def do_POST(self):
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204 if self.path == "/hook" else 403)
            self.end_headers()

        def log_message(self, *words):
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Postbox) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", posts
        server.shutdown()
        thread.join()


def webhook(name, url):
    """A notification block of Prefect's own, saved on the server."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    template = {"subject": "{{subject}}", "body": "{{body}}"}
    CustomWebhookNotificationBlock(name="foldin", url=url, json_data=template).save(name, overwrite=True)


@pytest.mark.chaos
def test_people_elsewhere_hear_what_became_of_an_expert(desk, zoo, postbox, verbs, tmp_path):
    url, posts = postbox
    webhook("ops", f"{url}/hook")
    webhook("shut", f"{url}/secret-token")
    desk.set(notify=["custom-webhook/shut", "custom-webhook/missing", "custom-webhook/ops"])
    foldin = verbs(desk.toml)
    desk.register(zoo / "expert-1", "task-1")
    code, out, said = foldin("watch", "tiny")
    assert (code, out) == (0, "tiny-experts v1: needs-approval as v2\n")
    assert "custom-webhook/shut could not be used: HTTPStatusError: Client error '403 Forbidden'" in said
    assert "custom-webhook/missing could not be used: ValueError: Unable to find block document named missing" in said
    assert "secret-token" not in said
    heard = [post for post in posts if "waits" in post["subject"]][-1]
    assert heard["subject"] == "foldin: tiny v2: tiny-experts v1 waits for a person"
    assert heard["body"].endswith("foldin approve tiny 2 --because TEXT, or foldin reject tiny 2 --because TEXT")
    assert foldin("approve", "tiny", 2, "--because", "fine\u202e\nindeed")[0] == 0
    assert posts[-1]["subject"] == "foldin: tiny v2: tiny-experts v1 approved"
    assert ": fine indeed\n" in posts[-1]["body"]
    desk.reopen().rule('approval = "always"', 'approval = "never"')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    desk.register(zoo / "expert-2", "task-2")
    desk.register(broken, "task-3")
    assert [state for _, state, _ in desk.watch()] == ["folded", "quarantined"]
    assert [post["subject"] for post in posts if "v2: tiny" not in post["subject"]][-1].endswith(" quarantined")
    assert any(post["subject"] == "foldin: tiny v3: tiny-experts v2 promoted" for post in posts)


# The form on Prefect's page.


def ask(url, question=None):
    """The answer to a GET, or to a POST of JSON."""
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


@pytest.fixture
def served(workshop, own_prefect, monkeypatch):
    """The API of a Prefect server on which `foldin serve` keeps the forms of a line that asks about everything."""
    desk = Desk(workshop / "foldin.toml").set(approval="always", trigger="manual")
    mark = f"FOLDIN_TEST={uuid.uuid4()}"
    with prefect_server(load(desk.toml), free_port()) as url:
        monkeypatch.setenv(*mark.split("="))  # after the server, which shall end last
        with open(workshop / "serve.log", "wb") as said:
            command = [sys.executable, "-m", "flows.cli", "serve"]
            often = {**os.environ, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
            process = subprocess.Popen(command, cwd=workshop, stdout=said, stderr=said, env=often)
        wait_until(lambda: any(each["name"] == "tiny" for each in ask(f"{url}/deployments/filter", {})), 150)
        yield desk, url
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    desk.at.ledger.close()


def runs_in(url, *states):
    """The approval runs in some states."""
    question = {"flows": {"name": {"any_": ["approval"]}}, "flow_runs": {"state": {"name": {"any_": [*states]}}}}
    return ask(f"{url}/flow_runs/filter", question)


def resume(url, run, **answer):
    return ask(f"{url}/flow_runs/{run['id']}/resume", {"run_input": answer})


@pytest.mark.chaos
def test_a_version_that_waits_is_a_suspended_run_with_a_form_and_the_answer_decides(served, zoo):
    desk, url = served
    for number in (1, 2):
        desk.register(zoo / f"expert-{number}", f"task-{number}")
    assert desk.watch() == [("v1", "needs-approval", 2)]
    desk.watch()  # asks again, and starts no second run
    (run,) = wait_until(lambda: runs_in(url, "Suspended"), 150)
    assert run["name"] == "tiny v2: may it be champion?"
    key = run["state"]["state_details"]["run_input_keyset"]
    form = wait_until(lambda: ask(f"{url}/flow_runs/{run['id']}/input/{key['schema']}"), 150)
    assert form["required"] == ["approve", "because", "who"]
    assert {name: each["type"] for name, each in form["properties"].items()} == {
        **{"approve": "boolean", "because": "string", "who": "string"}
    }
    assert "tiny v2, tiny-experts v1" in ask(f"{url}/flow_runs/{run['id']}/input/{key['description']}")
    for wrong in (
        {"approve": "maybe", "because": "x", "who": "ann"},
        {"approve": True, "because": "", "who": "ann"},
        {"approve": True, "because": "x"},
    ):
        assert resume(url, run, **wrong)["status"] == "REJECT"
    assert desk.champion == 1
    assert resume(url, run, approve=True, because="it is good", who="ann")["status"] == "ACCEPT"
    wait_until(lambda: runs_in(url, "Completed"), 150)
    assert (desk.champion, desk.states) == (2, ["folded", "pending"])
    assert desk.shown(2) == ("approved", "ann (unverified, through Prefect)", "it is good", False)
    # The next one is decided on the command line; who answers the form later changes nothing.
    assert desk.watch() == [("v2", "needs-approval", 3)]
    (run,) = wait_until(lambda: runs_in(url, "Suspended"), 150)
    desk.decide("reject", 3, "it is odd", "bob")
    assert resume(url, run, approve=True, because="late", who="eve")["status"] == "ACCEPT"
    wait_until(lambda: len(runs_in(url, "Completed")) == 2, 150)
    mine = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    wait_until(lambda: "tiny v3 does not wait any more: declined" in str(ask(f"{url}/logs/filter", mine)), 20)
    assert (desk.champion, desk.shown(3)[0]) == (2, "declined")
