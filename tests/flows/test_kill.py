"""Killing foldin anywhere and running it again: the same bytes, every expert once, nothing left over."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments.plain_client import register_expert
from flows.config import load
from flows.serve import temporary_prefect
from flows.versions import open_version
from flows.wiring import house, tracking_uri

pytestmark = pytest.mark.integration

# Runs `foldin watch tiny` once per point, each in a process of its own that has everything imported and nothing open,
# and sends that process a signal before or after the k-th call of one function. Prints how each process ended.
DRIVER = """
import functools, importlib, json, os, signal, sys
from flows.config import load
from flows.wiring import prepare_environment
from pathlib import Path
prepare_environment(load(Path("foldin.toml")))
for name in sys.argv[2].split():
    importlib.import_module(name)

def arm(number, module, path, when, count):
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, sys.modules[module])
    original, calls = getattr(owner, name), []
    def counted(*arguments, **keywords):
        calls.append(name)
        if when == "before" and len(calls) == count:
            os.kill(os.getpid(), number)
        answer = original(*arguments, **keywords)
        if when == "after" and len(calls) == count:
            os.kill(os.getpid(), number)
        return answer
    setattr(owner, name, counted)

def life(number, point):
    child = os.fork()
    if child == 0:
        arm(number, *point)
        from flows.cli import main
        try:
            main(["watch", "tiny"])
        except SystemExit as end:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(int(end.code or 0))
    return child

number, points = json.loads(sys.argv[1])
for point in points:
    child = life(number, point)
    if number == signal.SIGSTOP:
        os.waitpid(child, os.WUNTRACED)
        print(json.dumps([child, "stopped"]), flush=True)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([point, ended]), flush=True)
"""
IMPORTS = (
    "flows.cli flows.watch flows.merge flows.starting flows.publishing flows.scoring registry.ledger registry.store "
    "registry.mlflow_store registry.weights evaluation.models evaluation.score evaluation.gate evaluation.page "
    "evaluation.pictures evaluation.report merging.fold merging.measure mlflow torch transformers"
)


@pytest.fixture(scope="module", autouse=True)
def one_prefect(tmp_path_factory):
    """One Prefect for all processes of this file: starting one per process would take most of the time."""
    folder = tmp_path_factory.mktemp("prefect")
    (folder / "foldin.toml").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(folder))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        patch.delenv("PREFECT_API_URL", raising=False)
        with temporary_prefect(load(folder / "foldin.toml")):
            yield


@pytest.fixture(autouse=True)
def patient_lease(workshop):
    """A lease that no test outlives: who goes on at once took over from a process that it saw dead."""
    set_lease(workshop, 600.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, zoo, foldin):
    """What one run that nobody disturbs makes of the first experts: number of experts, foldin.toml -> outcome."""
    known = {}

    def outcome(experts, toml):
        if experts not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            (folder / "foldin.toml").write_text(toml.read_text())
            enlist(folder, zoo, *range(1, experts + 1))
            finish(folder, foldin)
            known[experts] = look_at(folder)
        return known[experts]

    return outcome


def set_lease(folder, seconds):
    toml = folder / "foldin.toml"
    head, _, tail = toml.read_text().partition("lease_seconds = ")
    toml.write_text(f"{head}lease_seconds = {seconds}\n{tail.partition(chr(10))[2]}")


def enlist(folder, zoo, *numbers):
    """Register experts by a plain MLflow client, before foldin ever ran."""
    (folder / ".foldin").mkdir(exist_ok=True)
    for number in numbers:
        uri = tracking_uri(load(folder / "foldin.toml"))
        register_expert(uri, "tiny-experts", zoo / f"expert-{number}", f"task-{number}")


def finish(folder, foldin):
    done = foldin(folder, "watch", "tiny")
    assert done.returncode == 0, done.stderr
    return done


def look_at(folder):
    """Everything that has to be the same after a disturbed and an undisturbed run."""
    house.cache_clear()
    at = house(str(folder / "foldin.toml"))
    number = at.ledger.line("tiny").champion
    champion = open_version(at, "tiny", number)
    client, experiment = at.mlflow._client, at.mlflow._experiment("tiny")
    facts = {
        "champion": number,
        "alias": at.mlflow.champion("tiny"),
        "weights": champion.memory.weights_sha256,
        "manifest": champion.manifest_sha256,
        "experts": [tuple(expert)[:3] for expert in champion.memory.experts],
        "versions": at.mlflow.versions("tiny"),
        "models": len(client.search_logged_models([experiment])),
        "runs": len(client.search_runs([experiment])),
        "states": [str(expert.state) for expert in at.ledger.experts("tiny")],
        "moves": [(event.kind, event.origin, event.target) for event in at.ledger.events("tiny")],
        "all done": all(event.done for event in at.ledger.events("tiny")),
        "holder": at.ledger.leases.holder("tiny").holder,
        "left": sorted(path.name for path in at.work("tiny").glob("*")),
    }
    at.ledger.close()
    return facts


def live(folder, number, *points):
    """One life per point; each must have ended by the signal."""
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([number, points]), IMPORTS],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    ends = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
    assert ends == [[list(point), -number] for point in points], ran.stdout + ran.stderr


def check_recovered(folder, foldin, wanted):
    finish(folder, foldin)
    assert look_at(folder) == wanted
    examined = foldin(folder, "doctor")
    assert (examined.returncode, examined.stdout) == (0, ""), examined.stdout


def test_killed_at_every_step_it_ends_as_if_nothing_had_happened(workshop, zoo, foldin, undisturbed):
    enlist(workshop, zoo, 1, 2, 3)
    live(
        workshop,
        signal.SIGKILL,
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
        ("merging.fold", "read_tensor", "before", 7),
        ("flows.merge", "score_models", "before", 1),
        ("registry.mlflow_store", "MlflowStore.point_champion", "after", 1),
        # the third
        ("registry.ledger", "Ledger.record_verdict", "after", 1),
        ("mlflow", "MlflowClient.log_model_artifact", "after", 3),
        ("registry.ledger", "Ledger.confirm", "after", 1),
    )
    check_recovered(workshop, foldin, undisturbed(3, workshop / "foldin.toml"))


def test_killed_around_the_registration_of_a_version_it_is_registered_once(workshop, zoo, foldin, undisturbed):
    enlist(workshop, zoo, 1, 2, 3)
    live(
        workshop,
        signal.SIGKILL,
        ("registry.mlflow_store", "MlflowStore.point_champion", "after", 1),
        # the first expert
        ("registry.mlflow_store", "MlflowStore._upload", "before", 1),
        ("mlflow", "MlflowClient.create_model_version", "before", 1),
        ("registry.ledger", "Ledger.confirm", "before", 1),
        # the second
        ("mlflow", "MlflowClient.create_model_version", "after", 1),
        ("registry.ledger", "Ledger.commit", "before", 1),
        # the third
        ("flows.scoring", "write_json", "after", 1),
        ("registry.mlflow_store", "MlflowStore.run_for", "after", 1),
    )
    check_recovered(workshop, foldin, undisturbed(3, workshop / "foldin.toml"))


def test_a_process_group_killed_at_random_times_changes_nothing(workshop, zoo, foldin, undisturbed):
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    print(f"seed {seed}")  # shown by pytest when the test fails
    enlist(workshop, zoo, 1, 2, 3)
    for number in (1, 2, 3):  # one kill per expert, so that none dies three times and is set aside
        watching = watch_process(workshop, start_new_session=True)
        for line in watching.stderr:
            if f"tiny-experts v{number} (task" in line or "v3: folded" in line:
                break
        time.sleep(dice.uniform(0.0, 1.0))
        os.killpg(watching.pid, signal.SIGKILL)
        watching.communicate()
    check_recovered(workshop, foldin, undisturbed(3, workshop / "foldin.toml"))


def watch_process(folder, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "watch", "tiny"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_two_that_watch_at_the_same_time_fold_each_expert_once(workshop, zoo, foldin, undisturbed):
    enlist(workshop, zoo, 1, 2, 3)
    both = [watch_process(workshop) for _ in range(2)]
    said = [each.communicate(timeout=120) for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    folded = sorted(line for out, _ in said for line in out.splitlines())
    assert folded == [f"tiny-experts v{number}: folded as v{number + 1}" for number in (1, 2, 3)]
    check_recovered(workshop, foldin, undisturbed(3, workshop / "foldin.toml"))


@pytest.mark.parametrize(
    "point",
    [
        ("flows.merge", "score_models", "before", 1),
        ("registry.ledger", "Ledger.record_verdict", "before", 1),
        ("registry.ledger", "Ledger.commit", "before", 1),
        ("registry.mlflow_store", "MlflowStore.point_champion", "before", 1),
    ],
    ids=lambda point: point[1],
)
def test_a_run_that_slept_beyond_its_lease_ends_fenced_and_changes_nothing(workshop, zoo, foldin, undisturbed, point):
    enlist(workshop, zoo, 1)
    finish_base(workshop, foldin)
    enlist(workshop, zoo, 2)
    set_lease(workshop, 2.0)
    sleeper = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps([signal.SIGSTOP, [point]]), IMPORTS],
        cwd=workshop,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid, _ = json.loads(sleeper.stdout.readline())
    finish(workshop, foldin)  # waits for the lease to run out, takes over, folds both
    os.kill(pid, signal.SIGCONT)
    out, err = sleeper.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == [list(point), 1]
    assert "error: E_FENCED line tiny: the line was taken over while this run worked on it" in err
    check_recovered(workshop, foldin, undisturbed(2, workshop / "foldin.toml"))


def finish_base(folder, foldin):
    started = foldin(folder, "init", "tiny")
    assert started.returncode == 0, started.stderr


def test_interrupted_by_a_person_any_number_of_times_no_expert_is_blamed(workshop, zoo, foldin, undisturbed):
    enlist(workshop, zoo, 1)
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            DRIVER,
            json.dumps([signal.SIGINT, [["flows.merge", "score_models", "before", 1]] * 4]),
            IMPORTS,
        ],
        cwd=workshop,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [json.loads(line)[1] for line in ran.stdout.splitlines()] == [130] * 4, ran.stderr
    check_recovered(workshop, foldin, undisturbed(1, workshop / "foldin.toml"))
