"""What is said on stderr: for people, or as JSON, and what each line is about."""

import json
import logging
import subprocess
import sys
from contextlib import suppress

import pytest

from flows import cli
from flows.about import about, facts, learn
from flows.telling import bar, busy, complain, logger, say, speak


@pytest.fixture
def said(capsys, monkeypatch):
    """A function: FOLDIN_LOG, whether it is loud, what is done -> stderr."""

    def hear(form, loud, *doing):
        monkeypatch.setenv("FOLDIN_LOG", form)
        speak(loud)
        try:
            for each in doing:
                each()
        finally:
            speak(False)
        return capsys.readouterr().err

    return hear


def fail():
    with suppress(ValueError):
        try:
            raise ValueError("no")
        except ValueError:
            logger.exception("it failed")
            raise


def work():
    busy("thinking")
    with about(line="demo"), bar("folding") as progress:
        progress(1, 2)
        learn(expert="experts v1")
        say("folding [red]")
    say("done")
    complain("it stopped")


def test_for_people_it_is_plain_text_and_quiet_is_quiet(said):
    assert said("", True, work) == "folding [red]\ndone\nerror: it stopped\n"
    assert said("plain", False, work) == "error: it stopped\n"


def test_as_json_every_line_says_what_it_is_about(said):
    lines = [json.loads(each) for each in said("json", True, work, fail).splitlines()]
    assert [each.pop("time")[-6:] for each in lines] == ["+00:00"] * 4
    assert "ValueError: no" in lines[3].pop("error")
    assert lines == [
        {"level": "info", "message": "folding [red]", "line": "demo", "expert": "experts v1"},
        {"level": "info", "message": "done"},
        {"level": "error", "message": "it stopped"},
        {"level": "error", "message": "it failed"},
    ]


def test_as_json_quiet_keeps_errors_and_a_worker_is_not_quiet(said):
    assert [json.loads(each)["message"] for each in said("json", False, work).splitlines()] == ["it stopped"]
    assert len(said("json", None, work).splitlines()) == 3


def test_what_it_is_about_ends_with_the_block_also_after_an_error():
    with suppress(ValueError), about(line="demo"):
        learn(expert="experts v1")
        raise ValueError
    assert facts() == {}


def test_an_unknown_format_is_an_error(workshop, capsys, monkeypatch):
    monkeypatch.setenv("FOLDIN_LOG", "jsn")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit):
        cli.main(["--config", str(workshop / "foldin.toml"), "status"])
    assert "FOLDIN_LOG is unknown. Expected one of plain, json. Found 'jsn'." in capsys.readouterr().err


def test_the_log_itself_stays_text(caplog, monkeypatch):
    monkeypatch.setenv("FOLDIN_LOG", "json")
    with caplog.at_level(logging.INFO, "foldin"):
        say("for Prefect's pages")
    assert [each.getMessage() for each in caplog.records] == ["for Prefect's pages"]


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for():
    code = "import sys; from flows.tracing import start, tag; tag('x'); assert not start(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert not [each for each in loaded.stdout.split() if each.startswith(("opentelemetry", "flows.spans"))]
