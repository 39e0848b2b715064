"""foldin.toml: what it may say, what it stands for, and what is said about what it may not say."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from evaluation.suites import write_suite
from flows import config, starting
from flows import settings as settings_of
from flows.config import load
from flows.options import AccessConfig, LineConfig, RegistryConfig, SearchConfig, SigningConfig
from flows.signing import check_signing
from registry.records import FoldinError

LINE = '[lines.demo]\nbase = "base"\nexperts = ["demo-experts"]\n'


@pytest.fixture
def write(tmp_path):
    """A function that writes a foldin.toml and returns its path."""

    def made(text):
        (tmp_path / "foldin.toml").write_text(text, encoding="utf-8")
        return tmp_path / "foldin.toml"

    return made


def said(call):
    """The whole message of the FoldinError that a call raises."""
    with pytest.raises(FoldinError) as caught:
        call()
    assert caught.value.refusal.remedy, "an error says what to do"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settings(**changes):
    return LineConfig(**{"base": "base", "experts": ("demo-experts",), **changes})


@pytest.mark.parametrize("kind", [RegistryConfig, LineConfig, SearchConfig, SigningConfig, AccessConfig])
def test_every_field_is_explained_on_its_line(kind):
    source = inspect.getsource(kind)
    explained = set(re.findall(r"^    (\w+): .+  # \S.{7,}$", source, flags=re.MULTILINE))
    assert explained == {each.name for each in dataclasses.fields(kind)}


def test_a_missing_file_is_an_empty_one_and_everything_is_below_its_folder(tmp_path):
    found = load(tmp_path / "foldin.toml", new=True)
    assert (found.registry, found.lines) == (RegistryConfig(), {})
    assert found.home == tmp_path / ".foldin"
    assert said(lambda: found.line("demo")) == (
        f"E_LINE line demo: there is no such line. Expected a [lines.NAME] table in {tmp_path}/foldin.toml. "
        "Correct the name, or start it with `foldin init demo --base DIR`."
    )


def test_a_line_needs_two_keys_and_the_rest_has_defaults(write):
    line = load(write(LINE)).line("demo")
    assert line == settings()
    assert (line.method, line.trigger, line.device, line.upload_patience) == ("opcm", "on-register", "cpu", 3600.0)


def test_an_unknown_line_is_told_the_known_ones(write):
    assert "Expected one of demo." in said(lambda: load(write(LINE)).line("demmo"))


def test_places_are_relative_to_the_file_wherever_the_process_was_started(write, tmp_path, monkeypatch):
    path = write(
        '[registry]\nhome = "kept"\ntracking_uri = "sqlite:///mlflow.db"\nledger_url = "sqlite:///sub/ledger.db"\n'
        f'artifact_root = "artifacts"\n{LINE}suites = {{ city = "suites/city", home = "~/suite" }}\n'
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = load(Path("../foldin.toml"))
    assert found.home == tmp_path / "kept"
    assert found.registry.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert found.registry.ledger_url == f"sqlite:///{tmp_path}/sub/ledger.db"
    assert found.registry.artifact_root == (tmp_path / "artifacts").as_uri()
    assert found.path(found.line("demo").base) == tmp_path / "base"
    assert found.line("demo").suites == {"city": f"{tmp_path}/suites/city", "home": str(Path.home() / "suite")}
    assert (load(path).registry, load(path).lines) == (found.registry, found.lines)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracking_uri", "http://mlflow:5000"),
        ("tracking_uri", "sqlite:////srv/mlflow.db"),
        ("ledger_url", "sqlite:///:memory:"),
        ("ledger_url", "postgresql+psycopg://ann:secret@db/foldin"),
        ("artifact_root", "s3://bucket/folder"),
    ],
)
def test_other_places_are_taken_as_they_are(write, key, value):
    assert getattr(load(write(f'[registry]\n{key} = "{value}"\n')).registry, key) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "registy = {}",
            ["unknown table 'registy'", "Expected one of lines, receiver, registry, stack", "Did you mean 'registry'"],
        ),
        ('[registry]\nledger = "x"', ["unknown key 'ledger' in [registry]", "Did you mean 'ledger_url'"]),
        (f'{LINE}metod = "opcm"', ["unknown key 'metod' in [lines.demo]", "Did you mean 'method'"]),
        (f'{LINE}"\\u001b[31m" = 1', [r"unknown key '\x1b[31m' in [lines.demo]"]),
        ("registry = 3", ["registry is not a table", "Expected a table [registry]", "Found 3"]),
        ("lines = 3", ["lines is not a table", "Found 3"]),
        ("[lines]\ndemo = 3", ["lines.demo is not a table", "Expected a table [lines.demo]", "Found 3"]),
        ('[lines.demo]\nexperts = ["x"]', ["[lines.demo] has no base", 'Expected base = "a folder"', "Add it to"]),
        ('[lines.demo]\nbase = "x"', ["[lines.demo] has no experts", 'experts = ["a registered model"]']),
        ("[lines.demo]\nbase = 3\nexperts = []", ["[lines.demo] base has the wrong type", "a text", "Found 3"]),
        ('[lines.demo]\nbase = "x"\nexperts = "y"', ["experts has the wrong type", "a list of texts", "Found 'y'"]),
        ('[lines.demo]\nbase = "x"\nexperts = [1]', ["experts has the wrong type", "Found [1]"]),
        (f"{LINE}interval = true", ["interval has the wrong type", "Expected a number", "Found True"]),
        (f'{LINE}gate = "strict"', ["gate has the wrong type", "Expected a table", "Found 'strict'"]),
        (f"{LINE}suites = {{ city = 3 }}", ["suites has the wrong type", "Expected a table of texts", "'city': 3"]),
        (f'{LINE}trigger = "hourly"', ["trigger is unknown", "on-register, nightly, manual", "Found 'hourly'"]),
        (
            f'{LINE}timezone = "Europe/Pariss"',
            ["timezone is unknown", "Did you mean 'Europe/Paris'"],
        ),
        (f'{LINE}timezone = "America"', ["timezone is unknown", "Found 'America'"]),
        (f'{LINE}timezone = "../etc/passwd"', ["timezone is unknown", "Found '../etc/passwd'"]),
        (f'{LINE}approval = "yes"', ["approval is unknown", "never, on-reject, always", "Found 'yes'"]),
        (f'{LINE}notify = ["slack"]', ["notify names no block", "TYPE/NAME", "Found 'slack'"]),
        (f"{LINE}interval = 0", ["interval is out of range", "0.1 or more", "Found 0"]),
        (f"{LINE}interval = nan", ["interval is out of range", "Found nan"]),
        (f"{LINE}upload_patience = -1", ["upload_patience is out of range", "0 or more", "Found -1"]),
        ("[registry]\nkeep = -1", ["[registry] keep is out of range", "a whole number from 0", "Found -1"]),
        ("[registry]\nkeep_thin = 2.5", ["keep_thin is out of range", "a whole number", "Found 2.5"]),
        ("[registry]\ncache = inf", ["cache is out of range", "gigabytes, 0 or more", "Found inf"]),
        ("[registry]\nlease_seconds = inf", ["lease_seconds is out of range", "Found inf"]),
        ("[receiver]\nport = 70000", ["[receiver] port is out of range", "from 1 to 65535", "Found 70000"]),
        ('[receiver]\nurl = "here"', ["[receiver] url is no address", "http(s)://HOST/PATH", "Found here"]),
        ("[stack]\ns3_command = ['serve']", ["[stack] s3_command names no {port}", "a command with {port} in it"]),
        ("[stack]\ns3_port = 0", ["[stack] s3_port is out of range", "from 1 to 65535", "Found 0"]),
        ('[registry]\nhome = "foldin.toml"', ["home is not a folder", "Expected a folder", "foldin.toml"]),
        ('[lines.demo]\nbase = "x"\nexperts = []', ["experts names no registered model", "Found []"]),
        ('[lines.demo]\nbase = "x"\nexperts = ["a/b"]', ["experts names no registered model", "Found 'a/b'"]),
        (
            '[lines.demo]\nbase = "x"\nexperts = ["demo"]',
            ["experts names the line's own registered model", "Found 'demo'", "such as demo-experts"],
        ),
        ('[lines."../x"]\nbase = "x"\nexperts = ["e"]', ["the line's name is not plain", "letters", "Found '../x'"]),
        ("[lines", ["the file is not TOML", "Expected TOML 1.0", "Found Expected ']' at the end of a table"]),
    ],
)
def test_what_is_wrong_is_said_with_place_expected_found_and_remedy(write, tmp_path, text, parts):
    message = said(lambda: load(write(text)))
    assert message.startswith(f"E_CONFIG {tmp_path}/foldin.toml: ")
    assert all(part in message for part in parts), message


def test_a_file_that_cannot_be_read_is_said_so(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    for path in (tmp_path, tmp_path / "latin.toml"):
        assert f"E_CONFIG {path}: the file cannot be read. Expected text in UTF-8." in said(
            lambda path=path: load(path)
        )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"method": "opcmm"},
            [
                "[lines.demo] method: there is no method 'opcmm'",
                "expected one of opcm, average",
                "Did you mean 'opcm'.",
            ],
        ),
        ({"parameters": {"energi": 0.5}}, ["method 'opcm' has no parameter 'energi'", "Did you mean 'energy'."]),
        ({"parameters": {"energy": 2}}, ["opcm: energy is 2, expected 0 <= energy < 1"]),
        ({"parameters": {"energy": "half"}}, ["opcm: energy is 'half', expected a number"]),
        ({"method": "average", "parameters": {"scale": 1}}, ["method 'average' has no parameter 'scale'"]),
        (
            {"gate": {"max_task_dropp": 0.1}},
            ["[lines.demo.gate] of foldin.toml: the key 'max_task_dropp' is unknown", "Did you mean 'max_task_drop'"],
        ),
        (
            {"gate": {"min_gain": 5}},
            [
                "[lines.demo.gate] of foldin.toml: min_gain is not a number in range",
                "from -1 to 1",
                "Found 5",
                "Correct it in",
            ],
        ),
        (
            {"schedule": "every night"},
            ["[lines.demo] of foldin.toml: the schedule is not a cron", "such as '0 2 * * *'", "Found 'every night'"],
        ),
        ({"schedule": "61 2 * * *"}, ["the schedule is not a cron", "Found '61 2 * * *'"]),
        ({"device": "gpu"}, ["the device is unknown", "Expected cpu, cuda or cuda:N", "Found 'gpu'"]),
        ({"device": "cuda:99"}, ["this machine has no such device", "Expected", "cpu", "Found 'cuda:99'"]),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_done(changes, parts):
    message = said(lambda: settings_of.check_settings(settings(**changes), "demo"))
    assert message.startswith("E_CONFIG [lines.demo")
    assert all(part in message for part in parts), message


def test_a_suite_of_the_line_that_is_not_there_is_the_lines_fault(tmp_path):
    wrong = settings(suites={"city": str(tmp_path / "nowhere")})
    assert said(lambda: settings_of.check_settings(wrong, "demo")).startswith(
        "E_SUITE suite of task city in [lines.demo.suites], file suite.json: the file is missing."
    )


def test_good_settings_pass(tmp_path):
    rows = [("Paris", 0, "gate"), ("Lima", 1, "gate")]
    write_suite(tmp_path, kind="text-classification", labels=("Europe", "America"), rows=rows)
    good = settings(
        method="task_arithmetic",
        parameters={"scale": 0.4},
        gate={"max_task_drop": 0.1},
        schedule="30 1 * * 1-5",
        timezone="Europe/Paris",
        suites={"city": str(tmp_path)},
    )
    settings_of.check_settings(good, "demo")


def test_the_settings_are_the_first_thing_that_start_looks_at():
    with pytest.raises(FoldinError, match="there is no method 'opcmm'"):
        starting.start(None, "demo", settings(method="opcmm"))


def test_the_names_of_lines_make_safe_folders():
    assert all(config.NAME.fullmatch(name) for name in ("demo", "fr-legal", "v1.2_x", "a" * 64))
    assert not any(config.NAME.fullmatch(name) for name in ("", ".", "..", "-x", "a/b", "a b", "é", "a" * 65, "a\n"))


def test_a_missing_file_is_said_where_it_is_not_to_be_made(tmp_path):
    message = said(lambda: load(tmp_path / "foldin.toml"))
    assert "there is no such file" in message
    assert "--config" in message
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_needs_the_package_that_speaks_to_it(monkeypatch):
    settings = LineConfig(base="base", experts=("experts",), workers="tcp://scheduler:8786")
    monkeypatch.setattr(settings_of, "find_spec", lambda name: object())
    settings_of.check_settings(settings, "tiny")
    monkeypatch.setattr(settings_of, "find_spec", lambda name: None)
    settings_of.check_settings(dataclasses.replace(settings, workers="2"), "tiny")
    with pytest.raises(
        FoldinError, match=r"E_CONFIG \[lines.tiny\] of foldin.toml: .*prefect-dask is not installed.*foldin\[dask\]"
    ):
        settings_of.check_settings(settings, "tiny")


def test_workers_may_be_a_number_without_quotes(tmp_path):
    assert config.parse(f"{LINE}workers = 2\n", tmp_path / "foldin.toml").line("demo").workers == "2"
    with pytest.raises(FoldinError, match="workers has the wrong type"):
        config.parse(f"{LINE}workers = true\n", tmp_path / "foldin.toml")


@pytest.mark.parametrize("workers", ["0", "-1", "two", "tcp://scheduler", "http://scheduler:8786", "1.5"])
def test_workers_is_a_number_or_a_scheduler(workers):
    settings = LineConfig(base="base", experts=("experts",), workers=workers)
    with pytest.raises(FoldinError, match="workers is neither a number nor an address"):
        settings_of.check_settings(settings, "tiny")


def test_the_files_of_a_table_signing_are_found_from_the_file_and_none_is_useless(tmp_path):
    def line(rows):
        toml = tmp_path / "foldin.toml"
        toml.write_text(f'[lines.a]\nbase = "b"\nexperts = ["e"]\n[lines.a.signing]\n{rows}')
        return load(toml).line("a")

    found = line('key = "k.pem"\nversions = ["k.pub", "/r.crt"]').signing
    assert found == SigningConfig(str(tmp_path / "k.pem"), "", (str(tmp_path / "k.pub"), "/r.crt"), ())
    assert line("").signing == SigningConfig()
    for rows, wrong in (
        ('key = "k.pem"', "has key and no versions"),
        ('versions = ["k"]\ncertificate = "k"', "has certificate and no key"),
        ('experts = "k.pub"', "a list of texts"),
        ('expert = ["k.pub"]', "Did you mean 'experts'"),
    ):
        assert wrong in said(lambda rows=rows: line(rows))


def test_a_line_that_asks_for_signatures_says_when_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.signing.find_spec", lambda name: None)
    text = said(lambda: check_signing(settings(signing=SigningConfig(experts=(str(tmp_path / "k.pub"),))), "demo"))
    assert "E_CONFIG [lines.demo.signing] experts: it asks for signatures" in text
    assert "Install foldin[signing]" in text
    check_signing(settings(), "demo")


def test_events_go_to_a_server_or_to_a_file_beside_the_configuration(tmp_path):
    def events(target):
        (tmp_path / "foldin.toml").write_text(f'[registry]\nopenlineage = "{target}"\n')
        return load(tmp_path / "foldin.toml").registry.openlineage

    assert events("") == ""
    assert events("events.jsonl") == str(tmp_path / "events.jsonl")
    assert events("https://ann:word@catalogue:5000/") == "https://ann:word@catalogue:5000/"
    assert "neither a server nor a file" in said(lambda: events("s3://bucket/events"))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            'approve = [""]',
            "names nobody. Expected accounts of the operating system, or anyone@prefect. Found ''",
        ),
        ('rollback = [" alice"]', "rollback names nobody"),
        ('approve = ["anyone@mlflow"]', "approve names nobody"),
        (
            'rollback = ["anyone@prefekt"]',
            "names nobody. Expected accounts of the operating system, or anyone@m",
        ),
        ('approve = "alice"', "approve has the wrong type. Expected a list of texts"),
        ('approvers = ["alice"]', "Did you mean 'approve'"),
    ],
)
def test_a_table_access_that_names_nobody_is_refused(write, rows, told):
    assert told in said(lambda: load(write(f"{LINE}[lines.demo.access]\n{rows}\n")))


def test_a_table_access_names_accounts_and_doors(write):
    rows = 'approve = ["alice", "ops@example.org", "anyone@prefect"]\nrollback = ["anyone@mlflow"]\n'
    found = load(write(f"{LINE}[lines.demo.access]\n{rows}")).line("demo").access
    assert found == AccessConfig(("alice", "ops@example.org", "anyone@prefect"), ("anyone@mlflow",))
    assert load(write(LINE)).line("demo").access == AccessConfig()
