"""Versions that wait for a person: which one does, what became of the others, and how MLflow shows it."""

import time
from typing import Any

from flows.telling import say
from flows.versions import find_merge
from flows.wiring import House
from registry.records import Decision, Expert, ExpertState, FoldinError, Merge, Refusal

WAITS, SUPERSEDED = "needs-approval", "superseded"


def waiting(house: House, line: str) -> Merge | None:
    """The version that a line's first pending expert was folded into and that a person has to decide; None when none.

    One whose parent is not the champion any more is superseded: its expert is folded anew.
    """
    pending = house.ledger.experts(line, ExpertState.PENDING)
    if not pending:
        return None
    champion = house.ledger.line(line).champion
    found = [each for each in house.ledger.merges(line) if each.undecided and each.expert_id == pending[0].id]
    return next((each for each in reversed(found) if each.parent == champion), None)


def state_of(house: House, merge: Merge) -> str:
    """How a version stands: passed, rejected, approved, declined, needs-approval or superseded."""
    if merge.decided or not merge.undecided:
        return str(merge.decided or merge.verdict.outcome)
    current = waiting(house, merge.line)
    return WAITS if current and current.version == merge.version else SUPERSEDED


def facts_of(house: House, line: str) -> dict[str, Any] | None:
    """What waits in a line, for people; None when nothing does."""
    merge = waiting(house, line)
    if merge is None:
        return None
    expert = expert_of(house, merge)
    reason = merge.verdict.reason or "it passed, and the line asks a person all the same"
    return {"version": merge.version, "expert": expert.name, "since": merge.created, "reason": reason}


def expert_of(house: House, merge: Merge) -> Expert:
    """The expert whose fold a merge is."""
    return next(each for each in house.ledger.experts(merge.line) if each.id == merge.expert_id)


def stands_still(house: House, line: str) -> bool:
    """Whether nothing may be folded in a line before a person has decided; said when it is so."""
    facts = facts_of(house, line)
    if facts:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["since"]))
        say(f"{line} v{facts['version']} ({facts['expert']}) waits for a person since {since}; {how(line, facts)}")
    return facts is not None


def how(line: str, facts: dict[str, Any]) -> str:
    """What a person types to decide."""
    return f"decide with `foldin approve {line} {facts['version']} --because …` or `foldin reject …`"


def misplaced(house: House, line: str) -> tuple[int | None, int | None] | None:
    """Where the alias `candidate` stands and where it should, when it is wrong; None when it is as the ledger says.

    An alias on a version that never waited is not foldin's, and is left alone while nothing waits.
    """
    held = {each.version for each in house.ledger.merges(line) if each.verdict.outcome == WAITS and each.version}
    if not held:
        return None
    current = waiting(house, line)
    wanted, seen = current.version if current else None, house.mlflow.candidate(line)
    return (seen, wanted) if seen != wanted and (wanted or seen in held) else None


def mend(house: House, line: str) -> None:
    """Let MLflow show what the ledger says; also after a run that died half-way. The alias is moved last."""
    wrong = misplaced(house, line)
    if wrong is None:
        return
    for version in house.ledger.parents(line).keys() & set(wrong):
        house.mlflow.label(line, version, _tags(house, find_merge(house, line, version)))
    house.mlflow.point_candidate(line, wrong[1])


def _tags(house: House, merge: Merge) -> dict[str, str]:
    facts = decided_by(house, merge)
    return {
        "foldin.verdict": state_of(house, merge),
        **({"foldin.decided_by": facts["who"], "foldin.because": facts["because"]} if facts else {}),
    }


def decided_by(house: House, merge: Merge) -> dict[str, Any] | None:
    """Who decided about a version, why and when; None when no person has."""
    if merge.decided is None:
        return None
    start = f"v{merge.version}: "
    for event in reversed(house.ledger.events(merge.line)):
        mine = event.target == merge.version or (event.target is None and event.because.startswith(start))
        if mine and event.kind == merge.decided:
            return {"who": event.who, "because": event.because.removeprefix(start), "at": event.at}
    return None


def undecided(house: House, line: str, version: int) -> Merge:
    """What the ledger says about a version that a person may decide now.

    Raises:
        FoldinError: E_VERSION for an unknown version, E_DECIDED for one that nobody was asked about, E_SUPERSEDED for
            one whose parent is not the champion any more, or whose expert was settled otherwise.
    """
    merge = find_merge(house, line, version)
    where = f"{line} v{version}"
    if not merge.undecided:
        what, remedy = "no person was asked about the version", f"choose one that `foldin status {line}` shows"
        raise FoldinError(Refusal("E_DECIDED", what, where, found=str(merge.verdict.outcome), remedy=remedy))
    if state_of(house, merge) == SUPERSEDED:
        champion = house.ledger.line(line).champion
        raise FoldinError(
            Refusal(
                code="E_SUPERSEDED",
                what="the champion was moved while the version waited, so it may not follow it any more",
                where=where,
                expected=f"champion v{merge.parent}",
                found=f"champion v{champion}, expert {expert_of(house, merge).state}",
                remedy=f"run `foldin watch {line}`; an expert that is pending is folded into the champion there is now",
            )
        )
    return merge


def settled_before(house: House, merge: Merge, decision: Decision) -> bool:
    """Whether the same decision was taken before.

    Raises:
        FoldinError: E_DECIDED when it was the other one.
    """
    if merge.decided is None or merge.decided is decision:
        return merge.decided is decision
    facts = decided_by(house, merge) or {"who": "a person", "because": ""}
    again = f"roll back with `foldin rollback {merge.line}`"
    if merge.decided is Decision.DECLINED:
        again = "register the expert again; it is then folded and waits anew"
    raise FoldinError(
        Refusal(
            code="E_DECIDED",
            what="a person has decided otherwise before",
            where=f"{merge.line} v{merge.version}",
            found=f"{merge.decided} by {facts['who']}: {facts['because']}",
            remedy=again,
        )
    )
