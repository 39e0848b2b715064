"""The promise of docs/operations.md, kept: one command, ten experts told by webhooks, a poll, a night, a rollback.

In this order, on one stack; what was measured is printed and written to promises.json.
"""

import json
import time
import urllib.request
from datetime import datetime
from statistics import median

import pytest
from mlflow import MlflowClient

from experiments.plain_client import register_expert
from flows.config import load
from tests.browsing import browsing
from tests.flows.patience import wait_until
from tests.flows.standing import foldin, kill, served, standing, variables

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
TOLD, BEGUN = 2.0, 15.0  # seconds from a registration to the flow run, and to the fold: medians of ten


class Production:
    """What a client of these services sees, from outside."""

    def __init__(self, toml, folder):
        self.toml, self.folder = toml, folder
        self.uri, self.prefect = load(toml).registry.tracking_uri, variables(toml)["PREFECT_API_URL"]

    def runs(self, flow, line=None):
        """The flow runs of a flow, of one line's deployment, the oldest first."""
        question = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"}
        if line:
            question["deployments"] = {"name": {"any_": [line]}}
        return ask(f"{self.prefect}/flow_runs/filter", question)

    def register(self, model, expert):
        """Its number, and when MLflow had it, in seconds since the epoch."""
        number = register_expert(self.uri, model, expert, "words")
        version = MlflowClient(self.uri, self.uri).get_model_version(model, str(number))
        return number, version.creation_timestamp / 1000

    def wait_for_rest(self, line):
        """Until no `watch` of a line has begun and not ended."""
        busy = {"PENDING", "RUNNING", "CANCELLING"}
        wait_until(lambda: not any(each["state_type"] in busy for each in self.runs("watch", line)), 120)

    def add_line(self, name, old, new):
        """One more line, which differs from `tiny` in one setting; the worker learns of it when it starts again."""
        text = self.toml.read_text()
        begin, end = text.index("[lines.tiny]"), text.index("[stack]")
        line = text[begin:end].replace("[lines.tiny", f"[lines.{name}").replace('"tiny-experts"', f'"{name}-experts"')
        self.toml.write_text(text + "\n" + line.replace(old, new))
        kill(self.toml, "worker")
        wait_until(lambda: name in {each["name"] for each in ask(f"{self.prefect}/deployments/filter", {})}, 120)


def ask(url, question):
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def moment(text):
    return datetime.fromisoformat(text).timestamp()


@pytest.fixture(scope="module")
def production(tmp_path_factory, furnish):
    """A line that would look by itself only after an hour."""
    folder = tmp_path_factory.mktemp("production")
    with standing(furnish(folder) / "foldin.toml") as toml, pytest.MonkeyPatch.context() as patch:
        for key, value in variables(toml).items():
            patch.setenv(key, value)
        yield Production(toml, folder)


def test_each_of_ten_experts_is_folded_through_the_webhook_in_seconds(production, expert_maker):
    measured = []
    for turn in range(1, 11):
        number, registered = production.register("tiny-experts", expert_maker(turn))
        assert number == turn
        wait_until(lambda turn=turn: served(production.uri) == 1 + turn, 300)
        champion_at = time.time()
        production.wait_for_rest("tiny")
        key = f"foldin tiny: tiny-experts v{number}"
        (told,) = (each for each in production.runs("watch", "tiny") if each["idempotency_key"] == key)
        fold = production.runs("merge-expert")[-1]
        times = (moment(told["created"]), moment(fold["start_time"]), champion_at)
        measured.append([round(each - registered, 2) for each in times])
    names = ("flow run", "fold", "champion")
    medians = dict(zip(names, map(median, zip(*measured, strict=True)), strict=True))
    said = json.dumps({"medians": medians, "each": measured})
    (production.folder / "promises.json").write_text(said)
    print(said)
    assert len(production.runs("merge-expert")) == 10
    assert medians["flow run"] < TOLD
    assert medians["fold"] < BEGUN


def test_what_no_webhook_tells_the_next_look_on_the_interval_finds(production, zoo):
    assert foldin(production.toml, "webhook", "remove").returncode == 0
    production.add_line("polled", "interval = 3600.0", "interval = 20.0")
    production.register("polled-experts", zoo / "expert-1")
    wait_until(lambda: served(production.uri, "polled") == 2, 180)
    looks = production.runs("watch", "polled")
    assert {(each["auto_scheduled"], "woken" in each["tags"]) for each in looks} == {(True, False)}
    text = production.toml.read_text()
    production.toml.write_text(text.replace("interval = 20.0", "interval = 3600.0"))
    production.wait_for_rest("polled")


def test_the_night_comes_by_its_cron(production, zoo):
    production.add_line("night", "interval = 3600.0", 'trigger = "nightly"\nschedule = "*/2 * * * *"')
    production.register("night-experts", zoo / "expert-1")
    wait_until(lambda: served(production.uri, "night") == 2, 300)
    wait_until(lambda: ended(production.runs("nightly", "night")), 60)
    night = ended(production.runs("nightly", "night"))[-1]
    assert (night["auto_scheduled"], night["created_by"]["type"]) == (True, "SCHEDULE")
    assert datetime.fromisoformat(night["expected_start_time"]).second == 0
    assert datetime.fromisoformat(night["expected_start_time"]).minute % 2 == 0
    assert production.runs("watch", "night") == []


def test_a_rollback_through_mlflows_own_interface_is_adopted(production):
    assert foldin(production.toml, "webhook", "install").returncode == 0
    moved = {"name": "tiny", "alias": "champion", "version": "3"}
    ask(f"{production.uri}/api/2.0/mlflow/registered-models/alias", moved)
    wait_until(lambda: "adopt" in foldin(production.toml, "log", "tiny").stdout, 120)
    assert served(production.uri) == 3
    doctor = foldin(production.toml, "doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr


def test_both_pages_show_it(production):
    pages = production.prefect.removesuffix("/api")
    with browsing(production.folder / "chromium") as look:
        picture = production.folder / "mlflow.png"
        versions = look(f"{production.uri}/#/models/tiny", "Version 11", "@ champion", picture=picture)
        assert versions.index("Version 3\n") < versions.index("@ champion") < versions.index("Version 2\n")
        runs = ("watch tiny", "nightly night", "night: what waits")
        look(f"{pages}/runs", *runs, picture=picture.with_name("runs.png"))
        flows = ("approval", "nightly", "rollback", "watch")
        deployments = look(f"{pages}/deployments", *flows, picture=picture.with_name("deployments.png"))
        assert all(line in deployments for line in ("tiny", "polled", "night"))
        look(f"{pages}/work-pools", "foldin-control", "foldin-gpu")


def ended(runs):
    return [each for each in runs if each["state_type"] == "COMPLETED"]
