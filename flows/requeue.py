"""An expert that has ended gets another chance: at the end of the queue, in a generation of its own."""

from flows.leasing import held
from flows.naming import find_expert
from flows.telling import say
from flows.wiring import House
from registry.records import ExpertState, FoldinError, Refusal


def requeue(at: House, line: str, text: str, because: str, who: str) -> str:
    """The name of the expert that waits again.

    The same expert, folded into the same version with the same settings and suites, is the same merge: the gate's first
    answer to it stands. What makes a difference is a champion that moved, or another configuration.

    Raises:
        FoldinError: E_EXPERT for an expert that the line does not know, that waits already or is in the champion.
    """
    at.config.line(line)
    with held(at, line, told=say) as lease:
        known = at.ledger.experts(line)
        expert = find_expert(text, known, f"line {line}")
        same = [each for each in known if each.name == expert.name or (each.digest and each.digest == expert.digest)]
        states = {each.state: each for each in same}
        if ExpertState.PENDING in states:
            what = f"{states[ExpertState.PENDING].name} waits already"
            raise _refuse(expert.name, what, f"run `foldin watch {line}`")
        if ExpertState.FOLDED in states:
            name = states[ExpertState.FOLDED].name
            remedy = f"take it out first: foldin replay {line} --without '{name}' --promote"
            raise _refuse(expert.name, f"the champion holds {name}, with the same weights", remedy)
        return at.ledger.requeue(lease, expert, because, who).name


def _refuse(name: str, what: str, remedy: str) -> FoldinError:
    return FoldinError(Refusal("E_EXPERT", what, f"expert {name}", remedy=remedy))
