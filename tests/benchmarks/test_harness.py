"""The harness: fresh processes in turns, what they took, and what is said about it."""

import argparse
import json

import pytest

from benchmarks.harness import Run, Side, SideError, compare, ratios, run_side, summary
from benchmarks.telling import document, tell

SIDE = """
import os, time
LARGE = bytearray(b"x") * (30 << 20)  # part of the baseline
FOUND = os.environ["OMP_NUM_THREADS"]

def work(megabytes, seconds, log):
    with open(log, "a") as file:
        file.write(f"{megabytes} {os.getpid()}\\n")
    block = bytearray(b"x") * (megabytes << 20)
    time.sleep(seconds)
    return {"threads": float(FOUND), "bytes": float(len(block))}

def fail(**arguments):
    raise ValueError(f"no such thing: {arguments}")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that processes can import, and a file that its function writes to."""
    (tmp_path / "contestants.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def work(module, name, megabytes, seconds=0.0):
    return Side(name, "contestants:work", {"megabytes": megabytes, "seconds": seconds, "log": str(module / "log")})


def test_sides_take_turns_in_processes_of_their_own(module):
    runs = compare([work(module, "small", 1), work(module, "large", 2)], repeats=2, threads=1)
    lines = [line.split() for line in (module / "log").read_text().splitlines()]
    assert [size for size, _ in lines] == ["1", "2", "1", "2"]
    assert len({process for _, process in lines}) == 4
    assert [len(found) for found in runs.values()] == [2, 2]


def test_a_run_is_measured_without_its_imports(module):
    run = run_side(work(module, "one", 100, seconds=0.2), threads=3)
    assert 0.2 <= run.seconds < 1.5
    assert run.details == {"threads": 3.0, "bytes": float(100 << 20)}
    assert 30 < run.baseline_rss_mb < 100
    assert 95 < run.peak_rss_mb - run.baseline_rss_mb < 115
    assert run.written_mb < 1


def test_the_memory_of_this_process_is_not_charged_to_a_side(module):
    ballast = bytearray(b"x") * (400 << 20)
    assert run_side(work(module, "one", 1), threads=1).peak_rss_mb < 100
    assert len(ballast) == 400 << 20


def test_a_failing_side_fails_the_comparison_with_its_text(module):
    with pytest.raises(SideError, match=r"side 'bad' \(contestants:fail\) ended with status 1(.|\n)*no such thing"):
        compare([work(module, "good", 1), Side("bad", "contestants:fail", {"a": 1})], repeats=1, threads=1)


def test_what_is_reported_is_the_median_and_the_spread():
    ours = [Run(second, 100.0, 50.0, 1.0, 2.0, {"rank": 3.0}) for second in (1.0, 3.0, 2.0)]
    theirs = [Run(second, 300.0, 50.0, 1.0, 2.0, {}) for second in (4.0, 6.0, 20.0)]
    facts = summary(ours)
    assert facts["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [1.0, 3.0, 2.0]}
    assert (facts["peak_rss_mb"], facts["baseline_rss_mb"], facts["details"]) == (100.0, 50.0, {"rank": 3.0})
    found = ratios({"ours": ours, "theirs": theirs}, "ours")["theirs/ours"]
    assert found == {
        "seconds": {"median": 4.0, "min": 2.0, "max": 10.0},
        "peak_rss": 3.0,
        "peak_rss_over_baseline": 5.0,
    }


def test_the_document_is_one_json_object_or_tables(capsys):
    chosen = argparse.Namespace(threads=2, seed=0, json=True, keep=None, repeats=1)
    runs = [Run(1.0, 100.0, 50.0, 1.0, 2.0, {})]
    facts = document("step", chosen, {"foldin": summary(runs)}, {}, accuracy={"foldin": {"error": 1e-6}})
    tell(facts, as_json=True)
    told = json.loads(capsys.readouterr().out)
    wanted = {"benchmark", "command", "date", "machine", "versions", "threads", "seed", "parameters", "sides", "ratios"}
    assert told.keys() == wanted | {"accuracy"}
    assert told["machine"].keys() == {"cpu", "cores", "memory_gb", "os"}
    assert told["parameters"] == {"repeats": 1}
    tell(facts, as_json=False)
    table = capsys.readouterr().out
    assert "foldin" in table
    assert "1e-06" in table
