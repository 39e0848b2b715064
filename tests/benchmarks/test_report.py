"""The report says what was measured, what was not, and what is missed."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, parallel, report
from benchmarks.report import SECTIONS, written
from benchmarks.shapes import llama_7b
from benchmarks.targets import TARGETS, Target, at, judged

ROOT = Path(__file__).resolve().parents[2]
SIDE = {
    "seconds": {"median": 2.0, "min": 1.0, "max": 3.0, "all": [2.0]},
    "peak_rss_mb": 1500.0,
    "baseline_rss_mb": 200.0,
}


def document(name, **more):
    return {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} --json --keep '/somewhere/on this machine' --repeats 5",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a processor", "cores": 2, "memory_gb": 8.0, "os": "Linux"},
        "versions": {"torch": "2.13.0"},
        "threads": 2,
        "parameters": {"repeats": 5, "quick": False},
        "sides": {"foldin average": SIDE, "foldin opcm": SIDE},
        "ratios": {"foldin average/copy": {"seconds": {"median": 2.0, "min": 1.0, "max": 3.0}}},
        **more,
    }


def test_what_was_not_measured_is_said_so():
    text = written({}, "benchmarks.png")
    assert text.count("Not measured yet.") == len(SECTIONS) - 1
    assert "Not measured: no GPU was at hand." in text
    assert "png" not in text


def test_verdicts_stand_beside_the_figures():
    text = written({"stream": document("stream")}, "benchmarks.png")
    assert "| foldin average | 1 | 2.000 | 1.000 | 3.000 | 1500 | 200 |" in text
    assert "| average: time of a copy | at most 2.5 times | 2 times | met |" in text
    assert "| average: peak memory | at most 1.5 GB | 1.57 GB | missed by 5 % |" in text
    assert "| ratios | foldin average/copy: seconds | 2 (1 to 3) |" in text
    assert "`python -m benchmarks.stream --json --repeats 5`" in text
    assert "somewhere" not in text


@pytest.mark.parametrize(
    ("parameters", "warning"),
    [
        ({"repeats": 1, "quick": True}, "A quick run"),
        ({"repeats": 3, "quick": False}, "Only 3 runs of each side"),
        ({"repeats": 5, "layers": 4}, "4 layers only; the targets are about 22"),
    ],
)
def test_what_is_no_evidence_is_called_so(parameters, warning):
    ratios = {"densified/adapter": {"seconds": {"median": 20.0, "min": 20.0, "max": 20.0}}}
    text = written({"adapters": document("adapters", parameters=parameters, ratios=ratios)}, "benchmarks.png")
    assert warning in text
    assert f"| 20 times | {'-' if parameters.get('quick') else 'met'} |" in text
    assert "| distance between the results | at most 1e-05 | not measured | - |" in text


def test_growth_is_measured_over_the_experts():
    points = {"1": (1.0, 100.0), "2": (2.0, 110.0), "20": (2.3, 112.0)}
    figures = {number: {"seconds": time, "peak_rss_mb": memory} for number, (time, memory) in points.items()}
    verdicts = {
        target.what: judged(target, document("scaling", experts={"opcm": figures})) for target in TARGETS["scaling"]
    }
    assert verdicts["opcm: memory, over all experts"] == ("at most 5 %", "12 %", "missed by 140 %")
    assert verdicts["opcm: memory, from the second expert on"][2] == "met"
    assert verdicts["opcm: time, from the second expert on"] == ("at most 10 %", "15 %", "missed by 50 %")
    assert verdicts["average: time, from the second expert on"] == ("at most 10 %", "not measured", "-")


def test_a_bound_of_nothing_is_met_by_nothing():
    target = Target("files", at("files"), 0, most=True)
    assert [judged(target, {"files": count})[2] for count in (0, 1)] == ["met", "missed"]


def test_the_program_writes_the_document_and_draws(tmp_path, monkeypatch):
    point = {"seconds": 1.0, "peak_rss_mb": 300.0}
    facts = document("scaling", experts={"average": {"1": point, "20": point}}, sizes={"opcm": {"20000000": point}})
    (tmp_path / "scaling.json").write_text(json.dumps(facts))
    out = tmp_path / "found.md"
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), "--out", str(out)])
    report.main()
    assert "](found.png)" in out.read_text()
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_in_the_repository_has_every_section():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert all(f"## {section.title}" in text for section in SECTIONS)


def test_numbers_of_workers_end_with_all_cores():
    assert [parallel.counts(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_shapes_of_llama_7b_are_counted():
    shape = llama_7b()
    found = {(size, projected): count for size, projected, count in gpu.kinds(shape)}
    assert shape.parameters == 6_738_415_616  # as published for Llama 7B
    assert found[(4096, 4096), True] == 128
    assert found[(11008, 4096), True] == 64
    assert found[(4096, 11008), True] == 32
    assert found[(32000, 4096), True] == found[(32000, 4096), False] == 1
