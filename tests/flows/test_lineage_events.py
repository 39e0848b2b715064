"""OpenLineage: what a catalogue hears of folds, and that nothing it does or fails to do touches one."""

import json
import shutil
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.serde import Serde
from safetensors.torch import load_file, save_file

from experiments.plain_client import champion, register_expert
from flows import emitting, merge
from flows.versions import find_merge, open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.records import FoldinError, Refusal

pytestmark = pytest.mark.integration


class Line:
    """The line `tiny` whose events go to a file or a server."""

    def __init__(self, folder, target):
        self.toml = folder / "foldin.toml"
        text = self.toml.read_text()
        self.toml.write_text(text.replace("[registry]\n", f"[registry]\nopenlineage = {json.dumps(str(target))}\n"))
        self.at = house(str(self.toml))

    def fold(self, folder, task):
        from flows.watch import watch

        config = self.at.config
        register_expert(tracking_uri(config), "tiny-experts", folder, task, artifact_root(config))
        return self.watch(watch)[-1]

    def watch(self, watch=None):
        from flows.watch import watch

        return watch("tiny", str(self.toml))


@pytest.fixture
def line(workshop, prefect, monkeypatch):
    """A function that opens the line with a target."""
    monkeypatch.setattr(emitting, "TOLD", set())
    made = []

    def opened(target):
        made.append(Line(workshop, target))
        return made[-1]

    yield opened
    for each in made:
        each.at.ledger.close()


@pytest.fixture
def heard(workshop):
    """The events in the file events.jsonl of the line's folder, each taken apart by the library's own classes."""
    return lambda: [checked(json.loads(row)) for row in (workshop / "events.jsonl").read_text().splitlines()]


def checked(event):
    """The event, if the classes of the library, whose checks raise, make the same of its fields."""
    facets = [event["run"]["facets"], event["job"]["facets"]]
    facets += [each["facets"] for each in (*event["inputs"], *event["outputs"])]
    for each in (facet for some in facets for facet in some.values()):
        assert each["_producer"] == event["producer"]
        assert each["_schemaURL"].startswith("https://openlineage.io/spec/")
    for name in event["run"]["facets"]:
        assert name in ("foldin_fold", "errorMessage")
    again = RunEvent(
        eventType=RunState(event["eventType"]),
        eventTime=event["eventTime"],
        run=Run(**event["run"]),
        job=Job(**event["job"]),
        inputs=[InputDataset(**each) for each in event["inputs"]],
        outputs=[OutputDataset(**each) for each in event["outputs"]],
        producer=event["producer"],
    )
    assert json.loads(Serde.to_json(again)) == event
    return event


def names(datasets):
    return [each["name"] for each in datasets]


def told(event):
    return event["run"]["facets"]["foldin_fold"]


def test_a_fold_is_a_run_with_base_parent_and_expert_and_the_version_it_made(line, heard, zoo, workshop):
    tiny = line("events.jsonl")
    for number in (1, 2):
        tiny.fold(zoo / f"expert-{number}", f"task-{number}")
    events = heard()
    assert [each["eventType"] for each in events] == ["START", "COMPLETE"] * 2
    assert events[0]["run"]["runId"] == events[1]["run"]["runId"] != events[2]["run"]["runId"]
    assert {each["job"]["name"] for each in events} == {"tiny.fold"}
    assert names(events[1]["inputs"]) == ["tiny/1", "tiny-experts/1"]
    assert names(events[3]["inputs"]) == ["tiny/1", "tiny/2", "tiny-experts/2"]
    assert [names(each["outputs"]) for each in events] == [[], ["tiny/2"], [], ["tiny/3"]]
    made = open_version(tiny.at, "tiny", 3)
    digests = events[3]["outputs"][0]["facets"]["foldin_digests"]
    assert digests["manifest_sha256"] == made.manifest_sha256
    assert digests["weights_sha256"] == made.memory.weights_sha256
    assert events[3]["outputs"][0]["facets"]["version"]["datasetVersion"] == "3"
    expert = events[3]["inputs"][2]["facets"]["foldin_digests"]
    assert expert["weights_sha256"] == made.memory.experts[1].weights_sha256
    facts, merged = told(events[3]), find_merge(tiny.at, "tiny", 3)
    assert (facts["state"], facts["verdict"], facts["method"], facts["parent"]) == ("folded", "passed", "opcm", 2)
    assert (facts["merge_key"], facts["mlflow_run"]) == (merged.merge_key, merged.run_id)
    assert (facts["expert"], facts["task"], facts["experts"]) == ("tiny-experts v2", "task-2", 2)
    assert {each["namespace"] for each in events[3]["inputs"]} == {f"sqlite:///{workshop}/.foldin/mlflow.db"}


@pytest.mark.chaos
def test_an_expert_that_is_refused_is_a_run_that_completed_without_an_output(line, heard, zoo, workshop, tmp_path):
    toml = workshop / "foldin.toml"
    toml.write_text(toml.read_text().replace("min_gain = -1.0", "min_gain = 1.0"))
    tiny = line("events.jsonl")
    broken = shutil.copytree(zoo / "expert-2", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    states = [tiny.fold(zoo / "expert-1", "task-1")["state"], tiny.fold(broken, "task-2")["state"]]
    assert states == ["rejected", "quarantined"]
    ends = heard()[1::2]
    assert [(each["eventType"], each["outputs"]) for each in ends] == [("COMPLETE", [])] * 2
    assert [told(each)["state"] for each in ends] == states
    assert "E_NONFINITE" in told(ends[1])["reason"]


@pytest.mark.chaos
def test_a_fold_that_fails_says_so_and_is_the_same_run_when_it_is_repeated(line, heard, zoo, monkeypatch):
    tiny = line("events.jsonl")

    def die(*arguments):
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr(merge, "promote", die)
        failure = FoldinError(Refusal("E_MLFLOW", "it went away"))
        with pytest.raises(FoldinError):
            tiny.fold(zoo / "expert-1", "task-1")
        failure = KeyboardInterrupt("a person")
        with pytest.raises(KeyboardInterrupt):
            tiny.watch()
    assert tiny.watch()[0]["state"] == "folded"
    events = heard()
    assert [each["eventType"] for each in events] == ["START", "FAIL", "START", "ABORT", "START", "COMPLETE"]
    assert len({each["run"]["runId"] for each in events}) == 1
    assert "E_MLFLOW it went away" in events[1]["run"]["facets"]["errorMessage"]["message"]


def test_a_run_that_was_overtaken_says_nothing_of_its_end(line, heard, zoo, monkeypatch):
    tiny = line("events.jsonl")

    def overtaken(*arguments):
        raise FoldinError(Refusal("E_FENCED", "another one"))

    monkeypatch.setattr(merge, "promote", overtaken)
    with pytest.raises(FoldinError, match="E_FENCED"):
        tiny.fold(zoo / "expert-1", "task-1")
    assert [each["eventType"] for each in heard()] == ["START"]


@contextmanager
def catalogue(answer):
    """A server on this machine: its URL, and what it was sent as (path, authorization, event)."""
    sent = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append((self.path, self.headers.get("Authorization"), event))
            answer(self)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def created(request):
    request.send_response(201)
    request.end_headers()


def broken(request):
    request.send_response(503)
    request.end_headers()


def silent(request):
    time.sleep(1.0)


def test_a_server_gets_the_events_with_the_key_of_the_environment(line, zoo, monkeypatch):
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "secret-key")
    with catalogue(created) as (url, sent):
        assert line(url).fold(zoo / "expert-1", "task-1")["state"] == "folded"
    assert [path for path, _, _ in sent] == ["/api/v1/lineage"] * 2
    assert {key for _, key, _ in sent} == {"Bearer secret-key"}
    assert [checked(event)["eventType"] for _, _, event in sent] == ["START", "COMPLETE"]


@pytest.mark.parametrize("answer", [broken, *(pytest.param(each, marks=pytest.mark.chaos) for each in (silent, None))])
@pytest.mark.chaos
def test_a_server_in_trouble_neither_fails_nor_holds_up_a_fold_and_is_spoken_of_once(
    line, zoo, monkeypatch, caplog, answer
):
    monkeypatch.setattr(emitting, "PATIENCE", 0.2)
    with catalogue(answer or created) as (url, _):
        port = urlsplit(url).port
        if answer is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        tiny = line(f"http://ann:hidden@127.0.0.1:{port}")
        began, real = [], emitting._emit
        monkeypatch.setattr(emitting, "_emit", lambda *each: began.append(timed(real, *each)))
        for number in (1, 2):
            assert tiny.fold(zoo / f"expert-{number}", f"task-{number}")["state"] == "folded"
    assert len(began) == 4
    assert max(began) < 2.0
    said = [each.getMessage() for each in caplog.records if "OpenLineage" in each.getMessage()]
    assert len(said) == 1, said
    assert "hidden" not in said[0]
    assert champion(tracking_uri(tiny.at.config), "tiny") == 3


def timed(call, *arguments):
    """Seconds that a call takes."""
    start = time.monotonic()
    call(*arguments)
    return time.monotonic() - start


@pytest.mark.chaos
def test_a_file_that_cannot_be_written_and_a_missing_package_are_spoken_of_and_no_more(line, zoo, caplog, monkeypatch):
    tiny = line("no/such/folder/events.jsonl")
    assert tiny.fold(zoo / "expert-1", "task-1")["state"] == "folded"
    monkeypatch.setitem(sys.modules, "openlineage.client.event_v2", None)
    assert tiny.fold(zoo / "expert-2", "task-2")["state"] == "folded"
    said = [each.getMessage() for each in caplog.records if "OpenLineage" in each.getMessage()]
    assert len(said) == 2
    assert "RuntimeError: Failed to write" in said[0]
    assert "install foldin[openlineage]" in said[1]
