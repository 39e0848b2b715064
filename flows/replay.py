"""The flow that rebuilds a line without some of its experts, or in another order, beside the champion.

Every expert that is kept is folded again as the line folds it, into a branch that starts at the last version before
the first change: what a line has that never saw the others, to the byte under the same numerics profile.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import flow

from flows.access import admitted
from flows.champion import agree, check_target, follow
from flows.judging import Judged
from flows.leasing import held
from flows.memory import Folded
from flows.merge import fold_tensors, judge
from flows.naming import find_expert
from flows.options import LineConfig
from flows.placing import placed
from flows.readmitting import Again, readmit
from flows.recipe import recipe_of
from flows.recording import recorded, registered
from flows.scoring import Bench, Subject, known_tasks, score, task_of
from flows.settings import check_settings
from flows.sparing import surroundings
from flows.telling import bar, say
from flows.thinning import had_back, restore
from flows.versions import Version, chain, find_merge, open_version, with_files
from flows.wiring import House, house
from registry.records import Decision, Expert, FoldinError, Lease, Merge, Refusal
from registry.verdicts import Outcome, Report, TaskScore, Verdict


@dataclass(frozen=True)
class Branch:
    """What came of a replay."""

    start: int  # version that it grew from
    head: Version
    experts: list[dict[str, Any]]  # that were folded again, or not: expert, state, reason, version


@flow(name="replay", flow_run_name="replay {line}", persist_result=False)
def replay(
    line: str,
    because: str,
    without: Sequence[str] = (),
    order: Sequence[str] = (),
    promote: bool = False,
    who: str = "a person",
    config_file: str = "foldin.toml",
) -> dict[str, Any]:
    """Build the line anew without some experts; the facts of the branch, of which the last version may be promoted.

    Args:
        line: its name.
        because: why; kept in the line's history.
        without: experts of the champion to leave out, as `find_expert` takes them.
        order: all that are kept, in the order in which they shall be folded; () leaves them as they were.
        promote: make the last version the champion, when the gate finds it no worse on what both know.
        who: asks for it.
        config_file: foldin.toml.

    Raises:
        FoldinError: E_ACCESS when the line lets others promote, E_EXPERT for an expert that the champion does not hold,
            E_BLOCKED, E_SOURCE or E_DIGEST when one that is kept is gone or changed; the champion is then unchanged.
    """
    at = house(config_file)
    settings, _ = placed(at.config.line(line))
    who = admitted(settings, line, "rollback", who) if promote else who
    check_settings(settings, line)
    with held(at, line, told=say) as lease, surroundings():
        agree(at, lease, say, "replay")
        champion = open_version(at, line, at.ledger.line(line).champion or 0)
        left, kept = chosen(at, line, champion, without, order)
        branch = grow(at, settings, lease, champion, kept)
        verdict, scores = compared(at, settings, line, branch.head, champion)
        moved = promote and verdict.passed and branch.head.number != champion.number
        _noted(at, lease, branch.head.number, f"{described(left, order)}: {because}", who, moved=moved)
    return {
        "line": line,
        "champion": champion.number,
        "without": [each.name for each in left],
        **_facts(branch),
        "verdict": str(verdict.outcome),
        "reason": verdict.reason,
        "scores": scores,
        "promoted": moved,
    }


def _noted(at: House, lease: Lease, number: int, told: str, who: str, *, moved: bool) -> None:
    """Write a branch into the line's history; `moved`, its last version becomes the champion."""
    if moved:
        check_target(at, lease.line, number)
        restore(at, lease, number, told, who)
        follow(at, lease, at.ledger.move(lease, "replay", number, told, who))
    else:
        at.ledger.remark(lease, "replayed", f"v{number}, {told}", who)


def _facts(branch: Branch) -> dict[str, Any]:
    memory = branch.head.memory
    return {
        "start": branch.start,
        "version": branch.head.number,
        "weights_sha256": memory.weights_sha256,
        "experts": branch.experts,
    }


def chosen(
    at: House, line: str, champion: Version, without: Sequence[str], order: Sequence[str]
) -> tuple[list[Expert], list[Expert]]:
    """The champion's experts that are left out, and those that are kept, in the order of folding."""
    rows = {each.id: each for each in at.ledger.experts(line)}
    merges = [find_merge(at, line, number) for number in reversed(chain(at, line, champion.number))]
    inside = [rows[each] for merge in merges for each in merge.experts]
    where = f"{line} v{champion.number}"
    left = [find_expert(text, inside, where) for text in without]
    kept = [each for each in inside if each not in left]
    if not order:
        return left, kept
    wanted = [find_expert(text, kept, where) for text in order]
    if sorted(each.id for each in wanted) != sorted(each.id for each in kept):
        what, names = "the order does not name every expert that is kept once", ", ".join(each.name for each in kept)
        raise FoldinError(Refusal("E_EXPERT", what, where, expected=names, found=", ".join(order)))
    return left, wanted


def described(left: Sequence[Expert], order: Sequence[str]) -> str:
    """What was asked for, for the line's history."""
    names = f"without {', '.join(each.name for each in left)}" if left else "with all experts"
    return f"{names}, in another order" if order else names


def grow(at: House, settings: LineConfig, lease: Lease, champion: Version, kept: Sequence[Expert]) -> Branch:
    """Fold what is kept, from the newest ancestor of the champion that holds nothing else."""
    head, done = beginning(at, lease.line, champion.number, [each.id for each in kept])
    head = had_back(at, lease, head.number, "a replay begins at it", "foldin")
    start, outcomes = head.number, list[dict[str, Any]]()
    before = {(each.model, each.version): each for each in champion.memory.experts}
    say(f"{lease.line}: replaying {len(kept) - done} of {len(kept)} experts from v{start}")
    for expert in kept[done:]:
        head, outcome = fold_beside(at, settings, lease, expert, before[expert.model, expert.version], head)
        outcomes.append(outcome)
    return Branch(start, head, outcomes)


def beginning(at: House, line: str, champion: int, wanted: Sequence[int]) -> tuple[Version, int]:
    """The newest ancestor whose experts are the first of those wanted, and how many it holds."""
    held, found, there = list[int](), (0, 0), with_files(at, line)
    for number in reversed(chain(at, line, champion)):
        held += find_merge(at, line, number).experts
        if held != list(wanted[: len(held)]):
            break
        if number in there:
            found = (number, len(held))
    return open_version(at, line, found[0]), found[1]


def fold_beside(
    at: House, settings: LineConfig, lease: Lease, expert: Expert, folded: Folded, head: Version
) -> tuple[Version, dict[str, Any]]:
    """The branch with one more expert, registered beside the champion; as it was when the gate rejects it."""
    # No person is asked in between; what the last rung rejects and a person approved before stays approved.
    again = readmit(at, replace(settings, approval="on-reject"), lease, expert, folded, head.number)
    work, admitted, _ = again
    recipe = recipe_of(settings, head.memory)
    candidate = fold_tensors(work, admitted, recipe)
    if isinstance(candidate, Refusal):
        raise FoldinError(candidate)
    return _kept(again, judge(work, admitted, candidate, recipe), head)


def _kept(again: Again, judged: Judged, head: Version) -> tuple[Version, dict[str, Any]]:
    """The branch after a judged fold, and what became of its expert."""
    work, admitted, archive = again
    at, lease, expert = work.house, work.lease, work.expert
    merge, record = recorded(work, admitted, judged)
    approved = merge.verdict.outcome is Outcome.WAITING and _stays_approved(at, merge)
    outcome: dict[str, Any] = {
        "expert": expert.name,
        "state": "rejected",
        "reason": merge.verdict.reason,
        "version": None,
        "source": "archive" if archive else "original",
        "error": archive.error if archive else 0.0,
    }
    if merge.verdict.passed or approved:
        kept = replace(merge, decided=Decision.APPROVED if approved else None)
        kept = registered(work, kept, judged.candidate, record)
        at.ledger.keep(lease, kept)
        head = open_version(at, lease.line, kept.version or 0)
        outcome |= {"state": "approved" if approved else "folded", "version": head.number}
    shutil.rmtree(judged.candidate.folder.parent, ignore_errors=True)
    into = f" into v{head.number}" if outcome["version"] else ""
    say(f"{expert.name}: {outcome['state']}{into} beside the champion{', from its archive' if archive else ''}")
    return head, outcome


def _stays_approved(at: House, merge: Merge) -> bool:
    """Whether a person approved the expert, in another fold, and did not decline it in this very one."""
    mine = {each.merge_key: each.decided for each in at.ledger.merges(merge.line) if merge.expert_id in each.experts}
    return Decision.APPROVED in mine.values() and mine.get(merge.merge_key) is not Decision.DECLINED


def compared(
    at: House, settings: LineConfig, line: str, head: Version, champion: Version
) -> tuple[Verdict, dict[str, dict[str, Any]]]:
    """The gate's answer to a branch on everything that it knows, and the scores: task -> champion, branch."""
    from evaluation.gate import gate, rules_from

    tasks = known_tasks(at, settings, head.memory, head.folder)
    if not tasks:
        return Verdict(Outcome.PASSED, weights_sha256=head.memory.weights_sha256), {}
    base = open_version(at, line, chain(at, line, head.number)[-1])
    bench = Bench(at, settings, base)
    known = {name: task_of(tasks[name].suite, champion.folder) for name in head.memory.tasks}

    def measured(version: Version, named: str) -> dict[str, TaskScore]:
        with bar(f"measuring {named} on {len(tasks)} tasks") as progress:
            subject = Subject(version.memory.weights_sha256, version.weights())
            return score(bench, subject, {**tasks, **known} if version is champion else tasks, progress=progress)

    ours, theirs = measured(head, "the branch"), measured(champion, "the champion")
    rules = rules_from(settings.gate, f"[lines.{line}.gate]")
    verdict = gate(Report(head.memory.weights_sha256, ours), Report(champion.memory.weights_sha256, theirs), rules)
    return verdict, {
        name: {"metric": ours[name].metric, "champion": _measured(theirs[name]), "branch": _measured(ours[name])}
        for name in tasks
    }


def _measured(found: TaskScore) -> float | None:
    return None if found.error else found.value
