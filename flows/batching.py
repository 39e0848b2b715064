"""Experts that wait, folded in one pass and judged once; a batch that does not pass is halved.

So an expert that is to blame ends up alone and is judged as ever, with a search and a person where the line asks for
them, and the others are folded, in their order. A batch of one is that from the start.
"""

from collections.abc import Callable, Sequence
from functools import partial

from prefect import flow

from flows.about import about, learn
from flows.champion import reconcile
from flows.dispatching import Outcome
from flows.emitting import emitted
from flows.leasing import held
from flows.merge import admit_expert, begun, conclude, fold_one, fold_tensors, judge, note_fallback, set_aside
from flows.observing import observed
from flows.options import LineConfig
from flows.placing import placed
from flows.recipe import recipe_of
from flows.settings import check_settings
from flows.sparing import sparing
from flows.telling import say
from flows.waiting import stands_still, waiting
from flows.wiring import House, house
from flows.work import Member, Work, work_on
from registry.records import Expert, ExpertState, FoldinError, Lease, Refusal

ROOM = frozenset({"E_MEMORY", "E_SYSTEM", "E_DISK"})  # what fewer experts may have enough of


@flow(name="merge-batch", flow_run_name="{line}: what waits", persist_result=False)
def merge_batch(line: str, config_file: str = "foldin.toml", fallback: str = "") -> list[Outcome]:
    """Fold the first experts that wait in a line, as many as it allows at once; what became of each.

    `fallback` says why the line's work pool does not fold them.
    """
    at = house(config_file)
    settings, fallback = placed(at.config.line(line), fallback)
    at.ledger.line(line)
    check_settings(settings, line)
    with held(at, line, told=say) as lease:
        if not reconcile(at, lease, say) or stands_still(at, line):
            return []
        first = next_batch(at, line, together(settings))
        note_fallback(at, lease, first, fallback)
        with sparing(at, lease, first):
            members, outcomes = gathered(at, settings, lease, first)
            outcomes += fold_members(at, settings, lease, members)
    return outcomes


def next_batch(at: House, line: str, most: int) -> list[Expert]:
    """The experts of the next pass: those of a batch that passed and was not committed, else as many as may be."""
    waiting = at.ledger.experts(line, ExpertState.PENDING)
    champion = at.ledger.line(line).champion
    for merge in reversed(at.ledger.merges(line)):
        begun = waiting[: len(merge.experts)]
        passed = merge.verdict.passed and merge.version is None and merge.parent == champion
        if passed and merge.also and [each.id for each in begun] == list(merge.experts):
            return begun
    # One that a run ended at without a word may end this one too.
    first = waiting[:most]
    return first[: next((place for place, each in enumerate(first) if each.attempts), len(first)) or 1]


def together(settings: LineConfig) -> int:
    """How many experts a pass may fold; one where each is searched for, or shown to a person."""
    alone = settings.approval == "always" or settings.search.when == "always"
    return 1 if alone else int(settings.batch)


def gathered(
    at: House, settings: LineConfig, lease: Lease, experts: Sequence[Expert]
) -> tuple[list[Member], list[Outcome]]:
    """The first experts that can be folded in one pass, and what became of those that were refused among them.

    It ends before one that is not complete yet, and before one whose task or weights another one of the batch has:
    what it is held to depends on what becomes of that one.
    """
    members, outcomes = list[Member](), list[Outcome]()
    for expert in experts:
        with about(line=lease.line, expert=expert.name):
            work = begun(at, settings, lease, expert)
        if work is None:
            break
        if not isinstance(work, Work):
            outcomes.append(work)
            continue
        admitted = admit_expert(work)
        if isinstance(admitted, Refusal):
            outcomes.append(set_aside(work, admitted))
        elif any({admitted.task, admitted.weights_sha256} & {*_marks(each)} for each in members):
            at.ledger.clear_attempts(lease, expert)
            break
        else:
            members.append(Member(work.expert, work.found, admitted))
    return members, outcomes


def _marks(member: Member) -> tuple[str, str]:
    return member.admitted.task, member.admitted.weights_sha256


def fold_members(at: House, settings: LineConfig, lease: Lease, members: Sequence[Member]) -> list[Outcome]:
    """Fold admitted experts in one pass; when that does not pass, the first half, then the second."""
    if not members or not reconcile(at, lease, say):  # somebody may have moved the alias since the last pass
        return []
    work = _work(at, settings, lease, members)
    many = f"{len(members)} experts in one pass" if work.others else f"task {work.expert.task}"
    say(f"{work.name} ({many}): folding into {lease.line} v{work.parent.number}")
    if not work.others:
        return [observed(work, partial(emitted, fold=partial(fold_one, admitted=members[0].admitted)))]
    outcome = tried(work, members)
    if outcome["version"]:
        return [{**outcome, "expert": each.name} for each in work.experts]
    say(f"{work.name}: {outcome['state']} in one pass: {outcome['reason']}; trying fewer")
    half = (len(members) + 1) // 2
    outcomes = fold_members(at, settings, lease, members[:half])
    if waiting(at, lease.line):
        return outcomes  # a person decides first
    for member in members[half:]:  # a version that was committed before them has cleared their attempts
        at.ledger.clear_attempts(lease, member.expert)
        at.ledger.begin(lease, member.expert, member.expert.task)
    return outcomes + fold_members(at, settings, lease, members[half:])


def tried(work: Work, members: Sequence[Member]) -> Outcome:
    """What became of a pass; what it had too little room for is like one that did not pass."""
    try:
        return observed(work, partial(fold_together, members=members))
    except FoldinError as error:
        pending = {each.id for each in work.house.ledger.experts(work.lease.line, ExpertState.PENDING)}
        if error.refusal.code not in ROOM or not pending.issuperset(each.id for each in work.experts):
            raise
        return {"expert": work.name, "state": "failed", "reason": str(error), "version": None}


def fold_together(work: Work, members: Sequence[Member]) -> Outcome:
    """Admitted experts into the champion as one version, if all of them may be; without a version none was folded."""
    admitted, recipe = members[-1].admitted, recipe_of(work.settings, work.parent.memory)
    learn(merge_key=work.key(admitted))
    candidate = fold_tensors(work, admitted, recipe)
    if isinstance(candidate, Refusal):
        return {"expert": work.name, "state": "refused", "reason": str(candidate), "version": None}
    judged = judge(work, admitted, candidate, recipe)
    if not judged.verdict.passed:
        found = judged.verdict
        return {"expert": work.name, "state": str(found.outcome), "reason": found.reason, "version": None}
    return _told(work, members, lambda: conclude(work, admitted, judged))


def _work(at: House, settings: LineConfig, lease: Lease, members: Sequence[Member]) -> Work:
    *others, last = members
    return work_on(at, settings, lease, last.expert, last.found)._replace(others=tuple(others))


def _told(work: Work, members: Sequence[Member], end: Callable[[], Outcome]) -> Outcome:
    """What `end` returns, an event about each expert around it."""
    if not members:
        return end()
    first, *rest = members
    own = work._replace(expert=first.expert, found=first.found)
    return emitted(own, lambda _: _told(work, rest, end))
