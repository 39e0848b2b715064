"""Who may approve and roll back: by the kernel's word on the command line, by nobody's in Prefect and MLflow."""

import getpass
import json

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.flow_engine import run_flow

from experiments.plain_client import champion, move_alias, register_expert
from flows.access import account
from flows.config import load
from flows.doctor import examine
from flows.wiring import artifact_root, house, tracking_uri
from registry.records import FoldinError

pytestmark = pytest.mark.integration
ME = account()


class Room:
    """A line whose champion is version 2, and whose next expert waits for a person as version 3."""

    def __init__(self, toml, verbs):
        self.toml, self.verb = toml, verbs(toml)

    def access(self, **names):
        """Name who may, from now on."""
        head = self.toml.read_text().partition("\n[lines.tiny.access]")[0]
        rows = "\n".join(f"{key} = {json.dumps(value)}" for key, value in names.items())
        self.toml.write_text(f"{head}\n[lines.tiny.access]\n{rows}\n")
        house.cache_clear()

    @property
    def at(self):
        return house(str(self.toml))

    @property
    def uri(self):
        return tracking_uri(load(self.toml))

    def history(self):
        return [(each.kind, each.who) for each in self.at.ledger.events("tiny")]

    def facts(self):
        """Everything that a refused request must leave as it is."""
        return self.at.ledger.events("tiny"), self.at.ledger.experts("tiny"), champion(self.uri, "tiny")

    def in_prefect(self, flow, **parameters):
        """What a run of a deployment of `flow` returns, started by somebody who may write to Prefect."""
        deployment = flow.to_deployment("tiny", parameters={"line": "tiny", "config_file": str(self.toml)}).apply()
        with get_client(sync_client=True) as client:
            run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        return run_flow(flow, flow_run=run, parameters=run.parameters)


@pytest.fixture(scope="module")
def made(tmp_path_factory, furnish, zoo, prefect):
    """Its folder, made once for all tests; each undoes what it does."""
    from flows.watch import watch

    toml = furnish(tmp_path_factory.mktemp("room")) / "foldin.toml"
    for number, approval in ((1, "never"), (2, "always")):
        text = toml.read_text().replace('\napproval = "never"', "")
        toml.write_text(text.replace("interval = 3600.0", f'interval = 3600.0\napproval = "{approval}"'))
        house.cache_clear()
        register_expert(
            tracking_uri(load(toml)),
            "tiny-experts",
            zoo / f"expert-{number}",
            f"task-{number}",
            artifact_root(load(toml)),
        )
        watch("tiny", str(toml))
    yield toml
    house(str(toml)).ledger.close()
    house.cache_clear()


@pytest.fixture
def room(made, kept, verbs):
    with kept(house(str(made))):
        found = Room(made, verbs)
        found.access()
        yield found


def test_the_account_is_the_kernels_word_and_not_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert getpass.getuser() == "somebody-else"
    assert account() == ME != "somebody-else"
    login = tmp_path / "loginuid"
    for written, name in (("0", "root"), ("4294967295", ME), ("4294967294", "uid 4294967294"), ("", ME)):
        login.write_text(written)
        assert account(login) == name
    assert account(tmp_path / "missing") == ME


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("approve", ("tiny", 3)),
        ("reject", ("tiny", 3)),
        ("rollback", ("tiny",)),
        ("rollback", ("tiny", "--to", 3)),
        ("replay", ("tiny", "--without", "task-1", "--promote")),
    ],
    ids=str,
)
def test_who_is_not_named_is_refused_and_changes_nothing(room, monkeypatch, verb, arguments):
    room.access(approve=["alice", "bob@example.org"], rollback=["alice", "bob@example.org"])
    monkeypatch.setenv("LOGNAME", "alice")
    before, fence = room.facts(), room.at.ledger.leases.holder("tiny").fence
    code, out, said = room.verb(verb, *arguments, "--because", "I want it")
    assert (code, out) == (1, "")
    assert (
        "error: E_ACCESS line tiny: the line names who may do that, and you are not among them. "
        f"Expected one of alice, bob@example.org. Found {ME}. Ask one of them; [lines.tiny.access] "
    ) in said
    assert room.facts() == before
    assert room.at.ledger.leases.holder("tiny").fence == fence  # a fold that runs was not disturbed either


def test_who_is_named_decides_and_the_history_has_the_account(room):
    room.access(approve=["alice", ME], rollback=["nobody-else"])
    assert room.verb("approve", "tiny", 3, "--because", "good")[0] == 0
    assert room.verb("rollback", "tiny", "--because", "bad")[0] == 1
    room.access(rollback=[ME])
    assert room.verb("rollback", "tiny", "--because", "bad")[0] == 0
    assert room.history()[-2:] == [("approved", ME), ("rollback", ME)]
    assert champion(room.uri, "tiny") == 2
    # A replay that promotes nothing is anybody's; who calls from Python is who the process works for.
    room.access(rollback=["alice"])
    assert room.verb("replay", "tiny", "--without", "task-1", "--because", "to see")[0] == 0
    room.access(approve=[ME])
    from flows.approval import reject

    with pytest.raises(FoldinError, match="E_DECIDED"):
        reject("tiny", 3, "no", "alice", str(room.toml))


def test_who_asks_in_prefect_is_unverified_and_refused_where_people_are_named(room):
    from flows.approval import approve
    from flows.rollback import rollback

    room.access(approve=[ME], rollback=[ME, "anyone@mlflow"])
    before = room.facts()
    with pytest.raises(FoldinError, match=rf"E_ACCESS line tiny: .* Prefect does not say who asks\. .* one of {ME}"):
        room.in_prefect(approve, version=3, because="good", who=ME)
    with pytest.raises(FoldinError, match=r"E_ACCESS line tiny: .* Prefect does not say who asks"):
        room.in_prefect(rollback, because="bad", who=ME)
    assert room.facts() == before
    room.access(approve=[ME, "anyone@prefect"], rollback=["anyone@prefect"])
    room.in_prefect(approve, version=3, because="good", who="ann")
    room.access()
    room.in_prefect(rollback, because="bad")
    assert room.history()[-2:] == [
        ("approved", "ann (unverified, through Prefect)"),
        ("rollback", "a person (unverified, through Prefect)"),
    ]
    assert "a person (unverified, through Prefect)" in room.verb("log", "tiny")[1]


def test_a_form_is_made_only_where_its_answer_would_count(room):
    from flows.approval import approval, present

    approval.to_deployment("tiny", parameters={"line": "tiny", "config_file": str(room.toml)}).apply()

    def forms():
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["approval"])))

    with get_client(sync_client=True) as client:  # there is one form a version, and other tests' versions are the same
        for run in forms():
            client.delete_flow_run(run.id)
    room.access(approve=[ME])
    present(room.at, "tiny")
    assert forms() == []
    room.access(approve=[ME, "anyone@prefect"])
    present(room.at, "tiny")
    assert [run.parameters["config_file"] for run in forms()] == [str(room.toml)]


def test_a_moved_alias_waits_for_somebody_who_is_named(room):
    room.access(rollback=[ME])
    move_alias(room.uri, "tiny", 1)
    (found,) = [each for each in examine(room.at) if each.code == "E_ALIAS"]
    assert "MLflow does not say who moved the alias" in found.what
    code, out, said = room.verb("watch", "tiny")
    assert (code, out) == (1, "")
    assert "E_BLOCKED line tiny: the alias champion was moved by hand to version 1" in said
    assert "One of them confirms it with `foldin rollback tiny --to 1`" in said
    assert room.at.ledger.line("tiny").champion == 2
    assert room.verb("approve", "tiny", 3, "--because", "good")[0] == 1
    # Confirmed, it is a rollback with a name.
    assert room.verb("rollback", "tiny", "--to", 1, "--because", "yes, that was me")[0] == 0
    assert (room.at.ledger.line("tiny").champion, room.at.ledger.line("tiny").blocked) == (1, "")
    assert not [each for each in examine(room.at) if "champion" in str(each)]
    # Moved back by whomever, nothing is to be confirmed.
    move_alias(room.uri, "tiny", 2)
    assert room.verb("watch", "tiny")[0] == 1
    move_alias(room.uri, "tiny", 1)
    room.verb("watch", "tiny")
    assert (room.at.ledger.line("tiny").champion, room.at.ledger.line("tiny").blocked) == (1, "")
    # Where MLflow is trusted with it, it is adopted as ever.
    room.access(rollback=["anyone@mlflow"])
    move_alias(room.uri, "tiny", 2)
    room.verb("watch", "tiny")
    assert [each for each in room.history() if each[0] == "adopted"] == [("adopted", "MLflow")]
    assert room.at.ledger.line("tiny").champion == 2
