"""One fold, watched from outside: its lines as JSON, its spans at a collector, its seconds in the ledger; no secret."""

import gzip
import json
import logging
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import create_engine, make_url, select

from experiments.plain_client import register_expert
from flows import cli
from flows.config import load
from flows.hiding import LOGGERS
from flows.metrics import Told, exposition
from flows.spans import Concealing
from flows.stack import servers
from flows.telling import complain
from flows.wiring import house
from registry.ledger import Ledger
from registry.records import FoldinError
from registry.schema import metadata

pytestmark = [
    pytest.mark.integration,
    pytest.mark.chaos,  # three servers for one file
    pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*BaseConnection.__del__:pytest.PytestUnraisableExceptionWarning"),
]
PASSWORDS = {name: f"planted-{name}-secret" for name in ("ledger", "tracking", "openlineage")}  # in URLs
PLANTED = {
    name: f"planted-{name.lower().replace('_', '-')}"
    for name in (
        *("FOLDIN_WEBHOOK_SECRET", "FOLDIN_SIGNING_PASSPHRASE", "OPENLINEAGE_API_KEY", "MLFLOW_TRACKING_PASSWORD"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PREFECT_API_KEY"),
    )
}
PLANTED["PREFECT_API_AUTH_STRING"] = "admin:planted-prefect-password"
OTLP = "Bearer%20planted-otlp-token"
SECRETS = [*PASSWORDS.values(), *PLANTED.values(), "planted-prefect-password", "planted-otlp-token"]


@contextmanager
def collector():
    """(its address, the spans that it was sent) of something that takes OTLP over HTTP."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(span for one in request.resource_spans for each in one.scope_spans for span in each.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()


class Watched(NamedTuple):
    """What is left of a watch that folded one expert and refused another."""

    toml: object
    out: str
    err: str
    spans: list


def with_password(url, name):
    """The URL with a login of which the password is a planted one."""
    user = make_url(url).username or "someone"
    return make_url(url).set(username=user, password=PASSWORDS[name]).render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, furnish, zoo, prefect, foldin):
    """On PostgreSQL, an MLflow server and S3, with secrets wherever one can be."""
    folder = furnish(tmp_path_factory.mktemp("watched"))
    path = folder / "foldin.toml"
    with servers(load(path)) as stack, collector() as (address, spans):
        ledger, tracking = with_password(stack.ledger_url, "ledger"), with_password(stack.tracking_uri, "tracking")
        urls = f'ledger_url = "{ledger}"\ntracking_uri = "{tracking}"\nartifact_root = "{stack.artifact_root}"\n'
        urls += f'openlineage = "http://someone:{PASSWORDS["openlineage"]}@127.0.0.1:1"\n'
        path.write_text(path.read_text().replace("[registry]\n", f"[registry]\n{urls}"))
        register_expert(stack.tracking_uri, "tiny-experts", zoo / "expert-1", "words", stack.artifact_root)
        (folder / "empty").mkdir()
        (folder / "empty/README.md").write_text("no weights")
        register_expert(stack.tracking_uri, "tiny-experts", folder / "empty", "empty", stack.artifact_root)
        traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_EXPORTER_OTLP_HEADERS": f"Authorization={OTLP}"}
        done = foldin(folder, "watch", "tiny", **PLANTED, **traces, FOLDIN_LOG="json", PREFECT_API_URL=prefect)
        yield Watched(path, done.stdout, done.stderr, spans)
        house.cache_clear()


def lines_of(text):
    """What was said on stderr, each line of it a JSON object."""
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_that_is_said_is_json_and_says_what_it_is_about(watched):
    print(watched.err)
    said = lines_of(watched.err)
    assert all({"time", "level", "message"} <= each.keys() for each in said)
    assert {each["level"] for each in said} <= {"info", "warning"}
    last = next(each for each in said if "is champion" in each["message"])
    about = {key: last[key] for key in ("line", "expert", "parent", "version")}
    assert about == {"line": "tiny", "expert": "tiny-experts v1", "parent": 1, "version": 2}
    assert re.fullmatch("[0-9a-f]{64}", last["merge_key"])
    refused = next(each for each in said if "quarantined" in each["message"])
    assert (refused["expert"], refused["parent"]) == ("tiny-experts v2", 2)
    assert not {"merge_key", "version"} & refused.keys(), "those were the first fold's"
    assert watched.out == "tiny-experts v1: folded as v2\ntiny-experts v2: quarantined\n"


def attributes(span):
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_fold_is_a_span_with_one_for_each_step(watched):
    folds = [span for span in watched.spans if span.name == "fold one expert"]
    steps = [
        {span.name: attributes(span) for span in watched.spans if span.parent_span_id == fold.span_id} for fold in folds
    ]
    assert [list(each) for each in steps] == [
        ["admit", "fold", "free rung", "canary", "full rung", "register"],
        ["admit"],
    ]
    first, second = map(attributes, folds)
    known = {"foldin.line": "tiny", "foldin.expert": "tiny-experts v1", "foldin.parent": 1}
    assert known.items() <= steps[0]["admit"].items()
    assert {**known, "foldin.version": 2, "foldin.state": "folded"}.items() <= first.items()
    assert first["foldin.merge_key"] == steps[0]["fold"]["foldin.merge_key"]
    assert second["foldin.state"] == "quarantined"
    assert len({span.trace_id for span in watched.spans}) == 1, "the watch and its folds are one trace"


def scraped(watched, accept=""):
    ledger = Ledger(load(watched.toml).registry.ledger_url)
    try:
        return exposition(ledger.measures.look(), Told(), accept)[0].decode()
    finally:
        ledger.close()


def test_what_the_steps_took_is_in_the_ledger(watched):
    text = scraped(watched)
    print(text)
    for step, runs in {"admit": 2, "fold": 1, "free rung": 1, "canary": 1, "full rung": 1, "register": 1}.items():
        assert f'foldin_step_seconds_count{{line="tiny",step="{step}"}} {runs}.0' in text
    assert 'foldin_fold_seconds_count{line="tiny"} 2.0' in text
    seconds = dict(re.findall(r'foldin_step_seconds_sum\{line="tiny",step="([\w ]+)"\} (\S+)', text))
    whole = float(re.search(r'foldin_fold_seconds_sum\{line="tiny"\} (\S+)', text)[1])
    assert 0 < sum(map(float, seconds.values())) < whole
    bytes_left = dict(re.findall(r'foldin_step_bytes_total\{line="tiny",step="(\w+)"\} (\S+)', text))
    assert float(bytes_left["fold"]) > float(bytes_left["admit"]) > 50_000
    assert re.search(r'foldin_score\{line="tiny",metric="accuracy",task="words"\} 0\.\d+', text)
    assert re.search(r'foldin_gate_value\{line="tiny",rule="min_gain",rung="full",task="words"\} ', text)


# secrets


def everywhere(watched, prefect):
    """(where, bytes) of all that was written or said, but for foldin.toml, where people wrote them."""
    yield from (("stdout", watched.out.encode()), ("stderr", watched.err.encode()))
    yield "spans", b"".join(span.SerializeToString() for span in watched.spans)
    yield "metrics", scraped(watched).encode()
    for path in watched.toml.parent.rglob("*"):
        if path.is_file() and path != watched.toml:
            content = path.read_bytes()
            yield str(path), gzip.decompress(content) if path.suffix == ".gz" else content
    ledger = load(watched.toml).registry.ledger_url
    for url in (ledger, make_url(ledger).set(database="mlflow")):
        engine = create_engine(url)
        with engine.connect() as connection:
            metadata_of = type(metadata)()
            metadata_of.reflect(connection)
            for table in metadata_of.sorted_tables:
                yield f"table {table.name}", str(connection.execute(select(table)).all()).encode()
        engine.dispose()
    with httpx.Client(base_url=prefect) as client:
        for what in ("logs", "flow_runs", "task_runs", "artifacts"):
            yield f"Prefect's {what}", client.post(f"/{what}/filter", json={"limit": 200}).raise_for_status().content


def test_no_secret_is_written_or_said(watched, prefect):
    places = dict(everywhere(watched, prefect))
    for place in ("stdout", "stderr", "spans", "table experts", "table tags", "Prefect's logs", "Prefect's flow_runs"):
        found = [content for where, content in places.items() if where == place]
        assert found, place
        assert any(b"tiny" in content for content in found), f"the search finds what is in {place}"
    hits = {where: secret for where, content in places.items() for secret in SECRETS if secret.encode() in content}
    assert hits == {}


ERRORS = {
    "a ledger that refuses": 'ledger_url = "postgresql+psycopg://someone:{}@127.0.0.1:1/foldin"',
    "a ledger of another kind": 'ledger_url = "mysql+pymysql://someone:{}@127.0.0.1/foldin"',
    "a ledger that is no address": 'ledger_url = "postgresql+psycopg://someone:{}@127.0.0.1:port/foldin"',
    "an MLflow that refuses": 'tracking_uri = "http://someone:{}@127.0.0.1:1"',
    "an MLflow that is no address": 'tracking_uri = "htp://someone:{}@127.0.0.1:1"',
    "events nowhere": 'openlineage = "ftp://someone:{}@127.0.0.1"',
    "no such key": 'tracking_url = "http://someone:{}@127.0.0.1"',
    "no TOML": 'tracking_uri = "http://someone:{}@127.0.0.1',
}


@pytest.fixture
def restored():
    """What a verb in this process does to the environment is undone."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("error", ERRORS)
def test_no_secret_is_in_an_error_or_its_traceback(workshop, capsys, monkeypatch, restored, error):
    for name, value in {**PLANTED, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    path, secret = workshop / "foldin.toml", "planted-in-an-address"
    path.write_text(path.read_text().replace("[registry]\n", f"[registry]\n{ERRORS[error].format(secret)}\n"))
    verb = ("webhook", "remove") if "MLflow" in error else ("status",)  # one asks MLflow, the other the ledger
    with pytest.raises(FoldinError) as raised:
        cli.main(["--debug", "--config", str(path), *verb])
    sys.excepthook(raised.type, raised.value, raised.tb)
    complain(f"{raised.value}, {PLANTED['PREFECT_API_AUTH_STRING']}")
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert [each for each in (secret, *SECRETS) if each in said] == []


def test_no_secret_of_an_error_is_in_a_log_or_a_span(monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED["AWS_SECRET_ACCESS_KEY"])
    for name in LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])  # Prefect's refuses what is of no run
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Concealing(spans)))
    text = f"http://someone:planted-in-an-address@host/ said no to {PLANTED['AWS_SECRET_ACCESS_KEY']}"

    def fail():
        with provider.get_tracer("test").start_as_current_span("fold"):
            try:
                raise RuntimeError(text)
            except RuntimeError:
                for name in LOGGERS:
                    logging.getLogger(name).exception("%s", text)
                raise

    with pytest.raises(RuntimeError):
        fail()
    (span,) = spans.get_finished_spans()
    for said in (caplog.text, span.to_json()):
        assert "http://***@host/ said no to ***" in said
        assert "planted" not in said
