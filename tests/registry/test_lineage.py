"""The tree of a line's versions, from plain facts."""

from dataclasses import replace

import pytest

from registry.lineage import Extent, ancestry, extents, met, open_moves, parents_of, tree
from registry.records import Event, Expert, ExpertState, Merge
from registry.verdicts import Outcome, Verdict

PASSED = Verdict(Outcome.PASSED)


def merge(version, parent, expert=None):
    return Merge(f"key-{version}", "demo", expert, parent, PASSED, version=version)


def expert(number):
    return Expert(number, "demo", "experts", number, 0, number, f"task-{number}", "", ExpertState.FOLDED, "", "", 0)


def move(number, target, done=True):
    return Event(number, "demo", "fold", None, target, "", "foldin", done, 0.0)


def test_nothing_registered_is_an_empty_tree():
    assert tree([], []) == ()
    rejected = Merge("key", "demo", 1, 1, Verdict(Outcome.REJECTED))
    assert tree([rejected], [expert(1)]) == ()


def test_every_version_knows_its_parent_its_expert_and_its_children():
    merges = [merge(1, None), merge(2, 1, 7), merge(3, 2, 8), merge(4, 2, 9)]
    found = tree(merges, [expert(7), expert(8), expert(9)])
    assert [(node.version, node.parent, node.children) for node in found] == [
        (1, None, (2,)),
        (2, 1, (3, 4)),
        (3, 2, ()),
        (4, 2, ()),
    ]
    assert [[each.id for each in node.experts] for node in found] == [[], [7], [8], [9]]


def test_a_version_of_several_experts_knows_them_in_their_order_and_each_met_its_parent():
    merges = [merge(1, None), replace(merge(2, 1, 9), also=(7, 8)), merge(3, 2, 10)]
    experts = [expert(number) for number in (7, 8, 9, 10)]
    assert [[each.id for each in node.experts] for node in tree(merges, experts)] == [[], [7, 8, 9], [10]]
    assert met(merges, experts) == {7: 1, 8: 1, 9: 1, 10: 2}


def test_a_merge_that_was_never_registered_is_in_no_tree_and_no_parent():
    merges = [merge(1, None), Merge("key", "demo", 1, 1, PASSED), merge(2, 1, 2)]
    assert [node.version for node in tree(merges, [expert(1), expert(2)])] == [1, 2]
    assert parents_of(merges) == {1: None, 2: 1}


def test_a_chain_of_thousands_is_no_deeper_than_one_version():
    merges = [merge(1, None), *(merge(number, number - 1, number) for number in range(2, 5001))]
    found = tree(merges, [expert(number) for number in range(2, 5001)])
    assert len(found) == 5000
    assert found[-2].children == (5000,)
    assert ancestry(parents_of(merges), 5000) == list(range(5000, 0, -1))


def test_ancestors_leave_out_the_other_branches():
    assert ancestry({1: None, 2: 1, 3: 2, 4: 2}, 4) == [4, 2, 1]
    assert ancestry({1: None}, None) == []
    with pytest.raises(KeyError):
        ancestry({1: None}, 9)


def test_the_newest_move_and_the_older_ones_whose_alias_was_never_seen():
    first, late, blocked, newest = move(1, 1), move(2, 2, done=False), move(3, None), move(4, 1, done=False)
    assert open_moves([first, late, blocked, newest]) == (newest, [late])
    assert open_moves([blocked]) == (None, [])


def test_what_is_kept_of_a_version_is_what_was_said_last_and_what_is_retired_stays_so():
    said = [
        ("thinned", "v2: room"),
        ("rollback", "v2: why"),
        ("thinned", "v3: v2: room"),
        ("restored", "v2: asked for"),
    ]
    assert extents(said) == {2: Extent.WHOLE, 3: Extent.THIN}
    said += [("retired", "v3: old"), ("restored", "v3: too late")]
    assert extents(said) == {2: "whole", 3: "retired"}
