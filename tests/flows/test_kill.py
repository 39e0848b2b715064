"""Killing foldin anywhere and running it again: the same bytes, every expert once, nothing left over."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.plain_client import register_expert
from flows.doctor import examine
from flows.versions import open_version
from flows.wiring import house
from tests.flows.forging import set_lease

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stock(tmp_path_factory, zoo):
    """MLflow's database with three experts that a plain client registered; foldin never ran."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where a plain client keeps artifacts when nobody says otherwise
        for number in (1, 2, 3):
            register_expert("sqlite:///mlflow.db", "tiny-experts", zoo / f"expert-{number}", f"task-{number}")
    return folder / "mlflow.db"


@pytest.fixture
def stocked(workshop, stock):
    """A workshop with three experts that wait, and a lease that no test outlives.

    So who goes on at once did not wait: it took over from a process that it saw dead.
    """
    return fill(workshop, stock)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stock, forge):
    """What one run that nobody disturbs makes of the three experts, with the settings of a workshop."""
    known = {}

    def outcome(workshop):
        settings = (workshop / "foldin.toml").read_text().partition("[lines.tiny]")[2]
        if settings not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            shutil.copyfile(workshop / "foldin.toml", folder / "foldin.toml")
            assert forge.life(fill(folder, stock))[1] == 0, forge.said()
            known[settings] = look_at(folder)
        return known[settings]

    return outcome


def fill(folder, stock):
    set_lease(folder, 600.0)
    (folder / ".foldin").mkdir(exist_ok=True)
    shutil.copyfile(stock, folder / ".foldin" / "mlflow.db")
    return folder


def look_at(folder):
    """Everything that has to be the same after a disturbed and an undisturbed run."""
    house.cache_clear()
    at = house(str(folder / "foldin.toml"))
    number = at.ledger.line("tiny").champion
    champion = open_version(at, "tiny", number)
    client, experiment = at.mlflow._client, at.mlflow._link.experiment("tiny")
    facts = {
        "champion": number,
        "alias": at.mlflow.champion("tiny"),
        "weights": champion.memory.weights_sha256,
        "manifest": champion.manifest_sha256,
        "experts": [tuple(expert)[:3] for expert in champion.memory.experts],
        "versions": at.mlflow.versions("tiny"),
        # One that is not ready was left by a run that died while it uploaded; nothing refers to it.
        "ready models": sum(str(model.status) == "READY" for model in client.search_logged_models([experiment])),
        "runs": len(client.search_runs([experiment])),
        "states": [str(expert.state) for expert in at.ledger.experts("tiny")],
        "moves": [(event.kind, event.origin, event.target, event.done) for event in at.ledger.events("tiny")],
        "holder": at.ledger.leases.holder("tiny").holder,
        "scratch": sorted(path.name for path in at.work("tiny").glob("*")),
        "doctor": examine(at),
    }
    at.ledger.close()
    return facts


def kill(forge, folder, *points):
    """One life per point; each must have died there."""
    for point in points:
        assert forge.life(folder, signal.SIGKILL, point)[1] == -signal.SIGKILL, f"{point}: {forge.said()}"


def watch_process(folder, **options):
    """The real command line as a process of its own."""
    command = [sys.executable, "-m", "flows.cli", "watch", "tiny"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **pipes, **options)


def test_killed_in_the_middle_of_a_fold_it_ends_with_the_champion_of_an_undisturbed_run(stocked, forge, undisturbed):
    kill(
        forge,
        stocked,
        ("registry.ledger", "Ledger.enrol", "after", 2),
        ("merging.fold", "fold_tensor", "after", 5),  # of the first expert
        ("mlflow", "MlflowClient.create_model_version", "after", 2),  # the second
        ("registry.ledger", "Ledger.commit", "after", 2),  # the third, before its alias is moved
    )
    assert forge.life(stocked)[1] == 0, forge.said()
    assert look_at(stocked) == undisturbed(stocked)


@pytest.mark.chaos
def test_killed_in_a_search_it_makes_the_same_choice(stocked, forge, undisturbed):
    toml = stocked / "foldin.toml"
    # Six times too strong for these models: the search goes back to about one for the first, and stays there.
    searching = "parameters = { strength = 6.0 }\n"
    searching += 'search = { when = "always", strengths = [0.2, 0.5], weights = [], energies = [] }'
    toml.write_text(toml.read_text().replace("interval = 3600.0", f"interval = 3600.0\n{searching}"))
    kill(
        forge,
        stocked,
        ("flows.search", "write_json", "before", 1),  # of the first expert, everything was tried
        ("flows.search", "climb", "before", 1),  # what was chosen is written down and folded
        ("registry.ledger", "Ledger.record_verdict", "after", 2),  # the second, the choice is judged
        ("flows.merge", "show_try", "after", 2),  # the third, one try is shown in MLflow
    )
    assert forge.life(stocked)[1] == 0, forge.said()
    found = look_at(stocked)
    assert open_version(house(str(toml)), "tiny", 4).memory.parameters["strength"] == 1.2
    assert found["runs"] == 2 + 3 * (1 + 3)  # the base, the history; each expert with its three tries
    assert found == undisturbed(stocked)


@pytest.mark.chaos
def test_killed_at_every_step_it_ends_as_if_nothing_had_happened(stocked, foldin, forge, undisturbed):
    kill(
        forge,
        stocked,
        # the base
        ("registry.store", "_copy_file", "after", 2),
        ("flows.starting", "register", "before", 1),
        ("mlflow", "MlflowClient.log_model_artifact", "after", 2),
        ("registry.ledger", "Ledger.commit", "before", 1),
        ("registry.ledger", "Ledger.commit", "after", 1),
        ("registry.ledger", "Ledger.enrol", "after", 2),
        # the first expert: a third death before its verdict would set it aside
        ("registry.store", "_copy_file", "after", 2),
        ("merging.fold", "fold_tensor", "after", 5),
        ("registry.ledger", "Ledger.commit", "after", 1),
        # the second
        ("flows.second_pass", "read_tensor", "before", 7),
        ("flows.merge", "judge", "before", 1),
        ("registry.mlflow_store", "MlflowStore.point_champion", "after", 1),
        # the third
        ("registry.ledger", "Ledger.record_verdict", "after", 1),
        ("mlflow", "MlflowClient.log_model_artifact", "after", 3),
        ("registry.ledger", "Ledger.confirm", "after", 1),
    )
    done = foldin(stocked, "watch", "tiny")
    assert done.returncode == 0, done.stderr
    assert look_at(stocked) == undisturbed(stocked)
    examined = foldin(stocked, "doctor")
    assert (examined.returncode, examined.stdout) == (0, "")


@pytest.mark.chaos
def test_killed_around_its_registration_a_version_is_registered_once(stocked, forge, undisturbed):
    kill(
        forge,
        stocked,
        ("registry.mlflow_store", "MlflowStore.point_champion", "after", 1),  # the base
        ("registry.mlflow_files", "Files.upload", "before", 1),  # the first expert
        ("mlflow", "MlflowClient.create_model_version", "before", 1),
        ("mlflow", "MlflowClient.create_model_version", "after", 2),  # the second
        ("registry.ledger", "Ledger.commit", "before", 1),
        ("flows.scoring", "write_atomic", "after", 2),  # the third
        ("registry.mlflow_runs", "Runs.run_for", "after", 1),
    )
    assert forge.life(stocked)[1] == 0, forge.said()
    assert look_at(stocked) == undisturbed(stocked)


@pytest.mark.chaos
def test_a_process_group_killed_at_random_times_changes_nothing(stocked, forge, undisturbed):
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    print(f"seed {seed}")  # pytest shows it when the test fails
    for number in (1, 2, 3):  # a later one each time, so that no expert dies three times and is set aside
        watching = watch_process(stocked, start_new_session=True)
        next(line for line in watching.stderr if f"tiny-experts v{number} (task" in line or "tiny-experts v3:" in line)
        time.sleep(dice.uniform(0.0, 1.0))
        os.killpg(watching.pid, signal.SIGKILL)
        watching.communicate()
    assert forge.life(stocked)[1] == 0, forge.said()
    assert look_at(stocked) == undisturbed(stocked)


@pytest.mark.chaos
def test_two_that_watch_at_the_same_time_fold_each_expert_once(stocked, forge, undisturbed):
    kill(forge, stocked, ("registry.ledger", "Ledger.enrol", "after", 3))
    both = [watch_process(stocked) for _ in range(2)]
    said = [each.communicate(timeout=120) for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    folded = sorted(line for out, _ in said for line in out.splitlines())
    assert folded == [f"tiny-experts v{number}: folded as v{number + 1}" for number in (1, 2, 3)]
    assert look_at(stocked) == undisturbed(stocked)


@pytest.mark.parametrize(
    "point",
    [
        ("registry.ledger", "Ledger.commit", "before", 1),
        pytest.param(("registry.mlflow_store", "MlflowStore.point_champion", "before", 1), marks=pytest.mark.chaos),
    ],
    ids=lambda point: point[1],
)
@pytest.mark.chaos
def test_a_run_that_slept_beyond_its_lease_ends_fenced(stocked, forge, undisturbed, point):
    kill(forge, stocked, ("registry.ledger", "Ledger.enrol", "after", 3))
    set_lease(stocked, 2.0)
    sleeper, ended = forge.life(stocked, signal.SIGSTOP, point)
    assert ended is None
    assert forge.life(stocked)[1] == 0, forge.said()  # waits for the lease to run out, takes over, folds all
    assert forge.wake(sleeper)[1] == 1
    fenced = "error: E_FENCED line tiny: the line was taken over while this run worked on it; it may write no more."
    assert fenced in forge.said(back=1)
    assert look_at(stocked) == undisturbed(stocked)
    assert forge.life(stocked)[1] == 0, forge.said()
    assert look_at(stocked) == undisturbed(stocked)


@pytest.mark.chaos
def test_two_that_start_a_line_at_the_same_time_start_it_once(stocked, forge, undisturbed):
    sleeper, ended = forge.life(stocked, signal.SIGSTOP, ("registry.ledger", "Ledger.add_line", "after", 1))
    assert ended is None
    assert forge.life(stocked)[1] == 0, forge.said()
    assert forge.wake(sleeper)[1] == 0
    assert look_at(stocked) == undisturbed(stocked)


@pytest.mark.chaos
def test_interrupted_by_a_person_any_number_of_times_no_expert_is_blamed(stocked, forge, undisturbed):
    for _ in range(4):
        assert forge.life(stocked, signal.SIGINT, ("flows.merge", "judge", "before", 1))[1] == 130, forge.said()
    assert forge.life(stocked)[1] == 0, forge.said()
    assert look_at(stocked) == undisturbed(stocked)
