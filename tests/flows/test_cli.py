"""The command line: quick, plain, one line an error; data on stdout; and nothing a stranger wrote is obeyed."""

import json
import re
import resource
import statistics
import subprocess
import sys
import unicodedata

import pytest
from safetensors.torch import load_file, save_file

from flows import cli, printing, reading
from flows.config import load
from flows.setup import add_expert, write_line
from flows.wiring import House, house, tracking_uri
from registry.lineage import tree
from registry.records import Expert, ExpertState, ExpertVersion, FoldinError, Merge
from registry.verdicts import Outcome, Verdict

SLOW = ("torch", "transformers", "mlflow", "prefect", "sqlalchemy", "pyarrow", "matplotlib", "rich")
VERBS = {
    *("demo", "init", "add", "serve", "watch", "merge", "status", "log", "show", "score", "rollback", "ui", "doctor"),
    *("approve", "reject"),
}
LINE = '[lines.tiny]\nbase = "base"\nexperts = ["tiny-experts"]\n'
HOSTILE = "[red]x[/] [/] :skull: \x1b[31mred\x1b[0m \u202egnp.exe \x07\x9b1m\r\nnext \u200bzero \u2028line"
READ_BACK = "[red]x[/] [/] :skull: [31mred[0m gnp.exe 1m next zero line"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "foldin.toml").write_text(LINE)
    return tmp_path


# How it starts and what it says.


def test_help_is_quick():
    def spent():
        """Of processor time: the other workers keep both cores busy."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds():
        before = spent()
        subprocess.run([sys.executable, "-m", "flows.cli", "--help"], check=True, capture_output=True)
        return spent() - before

    assert statistics.median(seconds() for _ in range(5)) < 0.3


def test_the_command_line_imports_nothing_slow():
    code = f"import sys, flows.cli; print([name for name in {SLOW} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_verb_is_there_and_every_option_of_it_is_explained():
    assert set(cli.cli.commands) >= VERBS
    for name, command in cli.cli.commands.items():
        assert command.short_help.endswith("."), name
        assert len(command.short_help) < 60, name  # so that the list shows it whole
        with pytest.raises(SystemExit) as ended:
            command.main([name, "--help"][1:])
        assert ended.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fold"], "No such command 'fold'"),
        (["watch", "--hourly"], "No such option"),
        (["merge"], "Missing argument 'LINE'"),
        (["show", "tiny", "two"], "is not a valid integer"),
        (["rollback", "tiny"], "Missing option '--because'"),
        (["add", "x", "--line", "tiny"], "Missing option '--task'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert words in said.err


def test_what_the_system_refuses_is_one_line(monkeypatch, capsys):
    def refusing(name):
        raise OSError(24, "Too many open files", "foldin.toml")

    monkeypatch.setattr("flows.config.load", refusing)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status"])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (1, "")
    assert said.err.splitlines() == [
        "error: E_SYSTEM the system refused something. Found [Errno 24] Too many open files: 'foldin.toml'. "
        "Free space, or repair what it names, and run this again."
    ]
    with pytest.raises(OSError, match="Too many"):
        cli.main(["--debug", "status"])


def one_error(ended, code=1):
    """The only line on stderr of a process that failed and put nothing on stdout."""
    assert (ended.returncode, ended.stdout) == (code, ""), ended
    (line,) = ended.stderr.splitlines()
    return line


def test_an_unknown_key_is_one_line_that_names_the_nearest(folder, foldin):
    (folder / "foldin.toml").write_text(f"{LINE}intervall = 3\n")
    line = one_error(foldin(folder, "status"))
    assert line.startswith(f"error: E_CONFIG {folder}/foldin.toml: unknown key 'intervall' in [lines.tiny]. Expected")
    assert line.endswith("Did you mean 'interval'.")


@pytest.mark.parametrize(
    "arguments", [("watch", "tinny"), ("merge", "tinny"), ("rollback", "tinny", "--because", "a test")]
)
def test_an_unknown_line_is_one_line_that_names_the_known(folder, foldin, arguments):
    line = one_error(foldin(folder, *arguments))
    assert line.startswith("error: E_LINE line tinny: there is no such line. Expected one of tiny. Correct the name")


def test_another_file_is_named_before_the_verb_and_in_the_message(folder, foldin):
    line = one_error(foldin(folder, "--config", "other.toml", "watch", "tiny"))
    assert f"E_CONFIG {folder}/other.toml: there is no such file" in line


def test_a_traceback_is_for_those_who_ask(folder, foldin):
    ended = foldin(folder, "--debug", "watch", "tinny")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "E_LINE line tinny" in ended.stderr


# What `init` and `add` refuse before they change anything.


def refusal(call):
    with pytest.raises(FoldinError) as caught:
        call()
    assert caught.value.refusal.remedy
    return str(caught.value)


def test_a_line_is_written_beside_what_is_there(tmp_path):
    toml = tmp_path / "foldin.toml"
    toml.write_text("# ours\n[registry]  # kept\nlease_seconds = 30.0\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    config = write_line(toml, "tiny", tmp_path / "base", [], "average")
    assert config == load(toml)
    assert toml.read_text().startswith("# ours\n[registry]  # kept\n")
    assert (config.line("tiny").experts, config.line("tiny").method) == (("tiny-experts",), "average")
    assert write_line(toml, "tiny", tmp_path / "base", ["tiny-experts"], "average") == config


@pytest.mark.parametrize(
    ("line", "base", "experts", "method", "message"),
    [
        ("tiny", None, [], None, r"E_CONFIG .*no base was given.* --base DIR"),
        ("tiny", "nowhere", [], None, r"E_BASE base of line tiny, file config.json: there is no checkpoint.*nowhere"),
        ("tiny", "base", [], "opcmm", r"E_CONFIG \[lines.tiny\] method: there is no method 'opcmm'.*mean 'opcm'"),
        ("../tiny", "base", [], None, r"E_CONFIG .*the line's name is not plain.*Found '../tiny'"),
        ("tiny", "base", ["tiny"], None, r"E_CONFIG .*names the line's own registered model"),
    ],
)
def test_a_line_that_could_not_work_is_not_written(tmp_path, line, base, experts, method, message):
    toml = tmp_path / "foldin.toml"
    toml.write_text("# ours\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    where = tmp_path / base if base else None
    assert re.search(message, refusal(lambda: write_line(toml, line, where, experts, method)))
    assert toml.read_text() == "# ours\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "average"}, "[lines.tiny] has another method. Expected opcm. Found average."),
        ({"experts": ["others"]}, "[lines.tiny] has another experts. Expected tiny-experts. Found others."),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(folder, changes, words):
    asked = {"base": None, "experts": [], "method": None, **changes}
    message = refusal(lambda: write_line(folder / "foldin.toml", "tiny", **asked))
    assert words in message
    assert "start a new line" in message
    other = refusal(lambda: write_line(folder / "foldin.toml", "tiny", folder / "other", [], None))
    assert f"[lines.tiny] has another base. Expected {folder}/base. Found {folder}/other." in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "a b\x1b[31m", None, None), r"E_TASK .*not plain.*Found 'a b\\x1b\[31m'"),
        (("x", "city", "mine.json", None), r"E_SUITE .*another file name\. Expected suite.json\. Found mine.json"),
        (("x", "city", None, "others"), r"E_LINE line tiny: the line does not watch.*one of tiny-experts.*--model"),
        (("x", "city", None, None), r"E_SOURCE x: there is no such folder or file\. Correct the path"),
    ],
)
def test_an_expert_that_intake_would_refuse_is_not_uploaded(folder, arguments, message):
    source, task, suite, model = arguments
    there = House(load(folder / "foldin.toml"), None)
    suite = folder / suite if suite else None
    assert re.search(message, refusal(lambda: add_expert(there, "tiny", folder.__class__(source), task, suite, model)))


# What is printed.


def harmless(text):
    """Whether a terminal would obey nothing in a text but its line breaks."""
    return all(mark == "\n" or unicodedata.category(mark) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for mark in text)


def history(versions, *, champion, children=lambda version: [version + 1]):
    """The facts of a line whose every version was folded from a hostile expert."""
    merges = [Merge("key-1", HOSTILE, None, None, Verdict(Outcome.PASSED), version=1)]
    for parent in range(1, versions):
        for child in children(parent):
            if child <= versions:
                facts = {"expert_id": child, "parent": parent, "verdict": Verdict(Outcome.PASSED), "version": child}
                merges.append(Merge(f"key-{child}", HOSTILE, **facts))
    known = [
        Expert(n, "x", HOSTILE, n, 0, n, HOSTILE, "", ExpertState.FOLDED, "", "", 0) for n in range(2, versions + 1)
    ]
    return {
        "line": HOSTILE,
        "champion": champion,
        "versions": [
            {**reading._node(node, set(range(1, champion + 1))), "state": "passed"} for node in tree(merges, known)
        ],
        "experts": [],
        "events": [],
    }


SCORE = {"metric": "accuracy", "value": 0.5, "split": "canary", "examples": 64}


def test_words_of_strangers_are_printed_as_they_are_and_obeyed_by_nothing(capsys):
    expert = {"name": HOSTILE, "task": HOSTILE, "state": "quarantined", "reason": HOSTILE, "into": 1}
    event = {"kind": "rollback", "from": 2, "to": 1, "because": HOSTILE, "who": HOSTILE, "at": 0.0}
    counts = dict.fromkeys(map(str, ExpertState), 0)
    digests = dict.fromkeys(("weights_sha256", "base_sha256", "manifest_sha256"), "0" * 64)
    check = {"passed": False, "rule": "min_gain", "text": HOSTILE}
    shown = {
        "line": HOSTILE,
        "version": 2,
        "parents": [1],
        "experts": [{"model": HOSTILE, "version": 1, "task": HOSTILE, "weight": 0.5}],
    }
    shown |= {**digests, "method": "opcm", "parameters": {HOSTILE: HOSTILE}, "verdict": "approved", "report": HOSTILE}
    shown |= {"decided": {"who": HOSTILE, "because": HOSTILE, "at": 0.0}, "search": HOSTILE}
    waiting = {"version": 2, "expert": HOSTILE, "since": 0.0, "reason": HOSTILE}
    printed = {
        "status": lambda: printing.print_status(
            [
                {
                    "line": HOSTILE,
                    "champion": 1,
                    "blocked": HOSTILE,
                    "working": "",
                    "blackout": "",
                    "experts": counts,
                    "waiting": waiting,
                }
            ]
        ),
        "log": lambda: printing.print_log({**history(2, champion=2), "experts": [expert], "events": [event]}),
        "show": lambda: printing.print_show({**shown, "checks": [check], "scores": {HOSTILE: SCORE}}),
        "comparison": lambda: printing.print_comparison(
            {HOSTILE: {HOSTILE: 0.5}}, {HOSTILE: 0.5}, {HOSTILE: {HOSTILE: 0.5}}
        ),
    }
    for name, show in printed.items():
        show()
        text = capsys.readouterr().out
        assert harmless(text), name
        assert READ_BACK.split(" [31m")[0] in " ".join(text.split()), name
        assert "[31mred" in text, name


def test_long_words_are_cut(capsys):
    printing.print_scores({"a" * 5000: {**SCORE, "value": 0.25}, "b": {**SCORE, "value": None}})
    text = capsys.readouterr().out
    assert len(text) < 1000
    assert "0.250" in text
    assert "not measured" in text


def test_a_history_of_thousands_is_drawn_straight_down(capsys):
    facts = history(2000, champion=2000)
    printing.print_log(facts)
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if re.search(r"\bv\d+  ", line)]
    assert [int(re.search(r"\bv(\d+)  ", line)[1]) for line in drawn] == list(range(1, 2001))
    assert {line.index("v") for line in drawn} == {4}
    assert "<- champion" in drawn[-1]
    assert json.loads(json.dumps(facts))["versions"][-1]["parent"] == 1999


def test_a_branch_that_was_left_hangs_on_its_fork_and_the_way_to_the_champion_stays_straight():
    forked = {1: [2], 2: [3, 5], 3: [4], 5: [6]}
    facts = history(6, champion=6, children=lambda version: forked.get(version, []))
    for node in facts["versions"]:
        node["in_champion"] = node["version"] in (1, 2, 5, 6)
    drawn = printing.lineage_tree(facts)
    assert [child.label.plain.split()[0] for child in drawn.children] == ["v1", "v2", "v5", "v6"]
    assert [child.label.plain.split()[0] for child in drawn.children[1].children] == ["v3", "v4"]
    assert "not in the champion" in drawn.children[1].children[0].label.plain
    assert [len(child.children) for child in drawn.children] == [0, 2, 0, 0]


def test_two_hundred_folds_of_a_real_ledger_are_read_and_drawn(tmp_path, capsys):
    from registry.ledger import Ledger

    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.add_line("tiny", "b" * 64)
    lease = ledger.leases.claim("tiny", "test", 600.0)
    passed = Verdict(Outcome.PASSED)
    ledger.record_verdict(lease, Merge("key-1", "tiny", None, None, passed))
    ledger.commit(lease, Merge("key-1", "tiny", None, None, passed, version=1))
    for number in range(2, 202):
        ledger.enrol("tiny", ExpertVersion("tiny-experts", number), f"task-{number}")
        (expert,) = ledger.experts("tiny", ExpertState.PENDING)
        ledger.note_digest(lease, expert, f"digest-{number}")
        merge = Merge(f"key-{number}", "tiny", expert.id, number - 1, passed, version=number)
        ledger.record_verdict(lease, merge)
        ledger.commit(lease, merge)
    facts = reading.log(House(load(tmp_path / "foldin.toml", new=True), ledger), "tiny")
    ledger.close()
    assert [node["version"] for node in facts["versions"]] == list(range(1, 202))
    assert all(node["in_champion"] for node in facts["versions"])
    printing.print_log(facts)
    assert capsys.readouterr().out.count("task-") == 200


def test_what_could_not_be_measured_is_null_and_not_nan():
    assert [reading._measured(value) for value in (0.5, float("nan"), None)] == [0.5, None, None]


# The verbs that need MLflow, on one small line.


@pytest.fixture(scope="module")
def line(tmp_path_factory, furnish, prefect):
    """The foldin.toml of a line with one expert folded, one set aside, and one rejected; made through the verbs."""
    toml = furnish(tmp_path_factory.mktemp("line")) / "foldin.toml"
    yield toml
    house(str(toml)).ledger.close()


@pytest.fixture
def verb(line, verbs):
    """The command line on this line: arguments -> exit code, stdout, stderr."""
    return verbs(line)


@pytest.mark.integration
def test_from_init_to_rollback_each_verb_ends_with_its_code_and_puts_only_data_on_stdout(line, verb, zoo, tmp_path):
    code, out, said = verb("init", "tiny")
    assert (code, out) == (0, "")
    assert "tiny v1 is the base and champion" in said
    assert verb("watch", "tiny", "--json")[:2] == (0, "[]\n")
    assert verb("merge", "tiny", "--json")[:2] == (0, "[]\n")
    assert verb("add", zoo / "expert-1", "--line", "tiny", "--task", "task-1")[:2] == (0, "tiny-experts v1\n")
    assert verb("watch", "tiny")[:2] == (0, "tiny-experts v1: folded as v2\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (zoo / "expert-2").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(zoo / "expert-2/model.safetensors")
    cut = {"pooler.dense.bias": weights["pooler.dense.bias"][1:].clone()}
    save_file({**weights, **cut}, broken / "model.safetensors")
    verb("add", broken, "--line", "tiny", "--task", "task-2")
    code, out, said = verb("watch", "tiny", "--json")
    assert (code, [each["state"] for each in json.loads(out)]) == (1, ["quarantined"])
    assert "E_SCHEMA expert tiny-experts v2, tensor pooler.dense.bias: the shapes differ" in said
    strict = line.read_text()
    line.write_text(strict.replace("min_expert_gain = -1.0", "min_expert_gain = 0.99"))
    verb("add", zoo / "expert-3", "--line", "tiny", "--task", "task-3")
    code, out, said = verb("merge", "tiny")
    assert (code, out) == (0, "")
    assert "Nothing can be folded in tiny now: none waits" in said
    assert verb("watch", "tiny")[:2] == (3, "tiny-experts v3: rejected\n")
    line.write_text(strict)
    line.write_text(strict.replace("[lines.tiny.gate]", 'device = "cuda:99"\n[lines.tiny.gate]'))  # it needs no device
    assert verb("rollback", "tiny", "--because", "a test", "--to", "1")[:2] == (0, "tiny: v2 -> v1\n")
    line.write_text(strict)
    assert verb("rollback", "tiny", "--because", "a test", "--to", "2")[:2] == (0, "tiny: v1 -> v2\n")


@pytest.mark.integration
def test_every_reading_verb_answers_in_json_and_for_people(line, verb):
    answers = {
        "status": (["status"], lambda facts: facts[0]["champion"] == facts[0]["alias"] == 2, "tiny"),
        "log": (
            ["log", "tiny"],
            lambda facts: [node["parent"] for node in facts["versions"]] == [None, 1],
            "<- champion",
        ),
        "show": (["show", "tiny"], lambda facts: facts["experts"][0]["task"] == "task-1", "none: this is the base"),
        "score": (
            ["score", "tiny"],
            lambda facts: facts["errors"] == {} and 0 <= facts["scores"]["task-1"]["value"] <= 1,
            "task-1",
        ),
        "doctor": (["doctor"], lambda facts: facts == [], ""),
    }
    for name, (arguments, right, words) in answers.items():
        code, out, _ = verb("--quiet", *arguments, "--json")
        facts = json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        assert (code, right(facts)) == (0, True), name
        code, out, _ = verb("--quiet", *arguments, *([1] if name == "show" else []))
        assert code == 0
        assert words in out, name
    counts = json.loads(verb("status", "tiny", "--json")[1])[0]["experts"]
    assert {state: number for state, number in counts.items() if number} == {
        "folded": 1,
        "quarantined": 1,
        "rejected": 1,
    }


@pytest.mark.integration
def test_what_is_not_there_is_one_line_of_error(verb):
    for arguments, words in {
        ("log", "tinny"): "error: E_LINE line tinny: no line of this name has been started. Expected one of tiny.",
        ("show", "tiny", "9"): "error: E_VERSION tiny v9: foldin did not register this version. Expected one of 1, 2.",
        ("show", "tiny", "0"): "error: E_VERSION tiny v0: foldin did not register this version.",
        ("score", "tiny", "9"): "error: E_VERSION tiny v9",
        ("rollback", "tiny", "--to", "9", "--because", "x"): "error: E_VERSION tiny v9",
        (
            "add",
            "nowhere",
            "--line",
            "tiny",
            "--task",
            "t",
        ): "error: E_SOURCE nowhere: there is no such folder or file.",
    }.items():
        code, out, said = verb("--quiet", *arguments)
        assert (code, out) == (1, "")
        (line,) = said.splitlines()
        assert line.startswith(words)


@pytest.mark.integration
def test_the_doctor_finds_a_version_that_foldin_did_not_register_and_a_setting_that_cannot_work(line, verb, zoo):
    from experiments.plain_client import register_expert

    text = line.read_text()
    register_expert(tracking_uri(load(line)), "tiny", zoo / "expert-4", "x")
    line.write_text(text.replace("[lines.tiny.gate]", 'device = "cuda:99"\n[lines.tiny.gate]'))
    code, out, _ = verb("doctor", "--json")
    line.write_text(text)
    assert (code, [each["code"] for each in json.loads(out)]) == (1, ["E_CONFIG", "E_VERSION"])
    assert json.loads(out)[1]["where"] == "tiny v3"


@pytest.mark.integration
def test_a_process_of_its_own_answers_the_same(line, verb, foldin):
    ended = foldin(line.parent, "status", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == json.loads(verb("status", "--json")[1])
