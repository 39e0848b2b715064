"""`foldin demo` keeps its promises, on the real model, from nothing."""

import json
import statistics

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]  # five models are fine-tuned, beside other work

TASKS = ["city", "script", "docstring", "line", "language"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory, foldin):
    folder = tmp_path_factory.mktemp("demo")
    done = foldin(folder, "demo", "--json", "out.json", timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((folder / "out.json").read_text()), "stdout": done.stdout, "folder": folder}


def test_five_experts_are_folded_in_order(facts):
    assert [(each["state"], each["version"]) for each in facts["folded"]] == [("approved", n) for n in range(2, 7)]
    assert facts["outcomes"] == facts["folded"]
    assert list(facts["accuracy"]["OPCM (the champion)"]) == TASKS


def test_the_expert_with_shuffled_labels_is_rejected_with_the_gates_reason(facts):
    # The fold itself cannot tell, what the expert learnt can: no task was measured in full for it.
    assert facts["rungs"] == {"free": True, "canary": False}
    (rejected,) = facts["rejected"]
    assert (rejected["state"], rejected["expert"]) == ("rejected", "demo-experts v6")
    assert "line: the expert alone" in rejected["reason"]
    assert facts["champion_before"] == facts["champion_after_rejected"] == 6


def test_the_expert_with_a_nan_is_quarantined_with_its_tensor(facts):
    (quarantined,) = facts["quarantined"]
    assert (quarantined["state"], quarantined["expert"]) == ("quarantined", "demo-experts v7")
    assert "E_NONFINITE" in quarantined["reason"]
    assert "tensor embeddings.word_embeddings.weight" in quarantined["reason"]
    assert facts["champion_after_quarantined"] == 6


def test_the_moved_alias_is_adopted_and_the_line_rolled_forward(facts):
    assert facts["rollback"] == {"from": 6, "moved_to": 4, "adopted": 4, "forward_to": 6}
    assert facts["champion"] == facts["champion_before"]
    kinds = [event["kind"] for event in facts["log"]["events"]]
    assert [kind for kind in kinds if kind != "waiting"] == ["init", *["approved"] * 5, "adopted", "rollback"]


def test_opcm_is_worth_it_on_this_line_as_measured_in_this_run(facts):
    means = {title: statistics.fmean(row.values()) for title, row in facts["accuracy"].items()}
    assert means == pytest.approx(facts["mean_accuracy"])
    assert means["OPCM (the champion)"] >= means["average"] + 0.08
    assert means["OPCM (the champion)"] >= means["base"] + 0.15


def test_the_search_chose_parameters_that_are_in_the_lineage(facts):
    versions = {each["version"]: each for each in facts["log"]["versions"]}
    assert sorted(versions) == list(range(1, 7))
    assert facts["searched"]["factor"] != 1.0
    assert facts["searched"]["parameters"] == {"strength": pytest.approx(facts["searched"]["factor"])}


def test_the_output_ends_with_the_tree_and_the_table(facts):
    assert "v6  + language  (demo-experts v5)  <- champion" in facts["stdout"]
    assert "OPCM (the champion)" in facts["stdout"]
    assert (facts["folder"] / facts["report"]).exists()
