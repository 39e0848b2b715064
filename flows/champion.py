"""The champion alias: a copy of what the ledger decided, moved last; and what to do when a person moved it."""

from collections.abc import Callable

from flows.access import check_alias
from flows.signing import require_signature
from flows.thinning import lacks_weights, restore
from flows.versions import find_merge, verified, with_files
from flows.wiring import House
from registry.lineage import open_moves, open_origins
from registry.records import Event, FoldinError, Lease, Refusal

Told = Callable[[str], None]

# Why a version may not be champion. Anything else (a server that is away, a full disk) says nothing about it.
UNFIT = frozenset(
    {
        *("E_VERSION", "E_GATE", "E_RETIRED", "E_DIGEST", "E_SIGNATURE", "E_SOURCE", "E_FILETYPE", "E_UNREACHABLE"),
        *("E_THIN", "E_FORMAT", "E_FOLD"),  # its weights were given up, and cannot be had back
        "E_ACCESS",  # nobody knows who put the alias there, and the line asks
    }
)


def follow(house: House, lease: Lease, move: Event) -> None:
    """Bring the alias to the target of a move that the ledger holds, and note that it was seen there.

    MLflow cannot check the fence. A run that is paused between this check and the call may still move the alias late,
    to a version that passed. It puts it back itself; when it dies before, the next `reconcile` does.

    Raises:
        FoldinError: E_FENCED when the line was taken over; the alias then stands where the ledger says.
    """
    assert move.target is not None
    house.ledger.leases.check(lease)
    house.mlflow.point_champion(lease.line, move.target)
    try:
        house.ledger.confirm(lease, move)
    except FoldinError as error:
        champion = house.ledger.line(lease.line).champion
        late = house.mlflow.champion(lease.line) == move.target  # not when a newer run has moved it on meanwhile
        if error.refusal.code == "E_FENCED" and late and champion not in (None, move.target):
            house.mlflow.point_champion(lease.line, champion)
        raise


def roll_back(house: House, lease: Lease, target: int, because: str, who: str) -> Event:
    """Make another version the champion, verified again first, its weights had back if they are not there.

    Raises:
        FoldinError: E_VERSION for an unknown version, E_GATE for one that did not pass, E_DIGEST for a damaged one,
            E_THIN for one whose weights cannot be had back, E_SIGNATURE for one without the signature that the line
            asks for; the champion is then unchanged.
    """
    check_target(house, lease.line, target)
    restore(house, lease, target, because, who)
    move = house.ledger.move(lease, "rollback", target, because, who)
    follow(house, lease, move)
    house.ledger.block(lease, "")
    return move


def check_target(house: House, line: str, version: int) -> None:
    """Nothing, when a version may be champion: registered by foldin, passed or approved, undamaged, signed as asked.

    Its serving weights are not looked at: `restore` does that, and makes them again where that must be.
    """
    merge = find_merge(house, line, version)
    if not merge.may_serve:
        never, undecided = "the version did not pass its gate", "no person has approved the version"
        raise FoldinError(
            Refusal(
                code="E_GATE",
                what=undecided if merge.undecided else never,
                where=f"{line} v{version}",
                found=merge.verdict.reason,
                remedy=f"choose a version that `foldin log {line}` shows as passed or approved",
            )
        )
    require_signature(house, line, version, verified(house, line, version, weights=False)[0])


def reconcile(house: House, lease: Lease, told: Told) -> bool:
    """Compare the alias with the ledger and mend or adopt the difference; True when the line may be folded.

    An alias that foldin itself moved late is put back. One that a person moved to a version that passed is adopted as
    a rollback, unless the line names who may roll back. Any other is reported and blocks the line: foldin does not
    fight people.
    """
    line = house.ledger.line(lease.line)
    events = house.ledger.events(lease.line)
    newest, overtaken = open_moves(events)
    seen = house.mlflow.champion(lease.line)
    if newest is None or newest.target is None:
        return False
    if seen == newest.target:
        if not newest.done:
            house.ledger.confirm(lease, newest)
    elif seen in open_origins(events):
        told(f"finishing the move of {lease.line}@champion to version {newest.target}")
        follow(house, lease, newest)
    elif any(seen == move.target for move in overtaken):
        _put_back(house, lease, newest.target, [move for move in overtaken if move.target == seen], told)
    else:
        return _adopt(house, lease, seen, line.blocked, told)
    if line.blocked:
        house.ledger.block(lease, "")
    return True


def agree(house: House, lease: Lease, told: Told, then: str) -> None:
    """As `reconcile`, for those who need the line: E_BLOCKED when it is not free, with what comes `then`."""
    if not reconcile(house, lease, told):
        raise FoldinError(_blocked(lease.line, house.ledger.line(lease.line).blocked, f", then {then}"))


def blocked(house: House, line: str) -> Refusal | None:
    """Why nothing is folded into a line until a person has moved the alias; None when nothing is in the way."""
    because = house.ledger.line(line).blocked
    return _blocked(line, because) if because else None


def _blocked(line: str, because: str, then: str = "") -> Refusal:
    remedy = f"move the alias champion to a version that passed, or use `foldin rollback {line}`{then}"
    return Refusal("E_BLOCKED", because, f"line {line}", remedy=remedy)


def mend_served(house: House, lease: Lease, told: Told) -> None:
    """Give the versions that an alias names their serving weights back, where they are not all there.

    Somebody put an alias on a thin version; or a run that was overtaken removed them late, and died.
    """
    line = lease.line
    for number in sorted(with_files(house, line) & house.mlflow.aliased(line)):
        try:
            if lacks_weights(house, line, number):
                restore(house, lease, number, "an alias names it", "foldin")
        except FoldinError as error:
            if error.refusal.code not in UNFIT:
                raise
            told(f"{line} v{number}, which an alias names, has no weights, and they cannot be had back: {error}")


def _put_back(house: House, lease: Lease, target: int, late: list[Event], told: Told) -> None:
    """Undo a late move of an overtaken run. It can happen once: the next move to that version is a person's."""
    told(f"{lease.line}@champion was moved late to version {late[0].target} by an overtaken run; putting it back")
    follow(house, lease, house.ledger.move(lease, "repaired", target, "a late move of an overtaken run", "foldin"))
    for move in late:
        house.ledger.confirm(lease, move)


def _adopt(house: House, lease: Lease, seen: int | None, blocked: str, told: Told) -> bool:
    """Take a person's move of the alias for a rollback, if the version is whole and passed; else block the line."""
    try:
        if seen is None:
            because = f"the alias champion of {lease.line} was removed; set it to the version that users shall load"
            house.ledger.block(lease, because)
            told(because)
            return False
        check_target(house, lease.line, seen)
        check_alias(house.config.line(lease.line), lease.line, seen)
        restore(house, lease, seen, "the alias was moved in MLflow", "MLflow")
    except FoldinError as error:
        if error.refusal.code not in UNFIT:
            raise
        why = str(error).rstrip(".")
        because = f"the alias champion was moved by hand to version {seen}, which may not be champion: {why}"
        house.ledger.block(lease, because)
        told(because)
        return False
    told(f"{lease.line}@champion was moved by hand to version {seen}; adopted")
    move = house.ledger.move(lease, "adopted", seen, "the alias was moved in MLflow", "MLflow")
    house.ledger.confirm(lease, move)
    if blocked:
        house.ledger.block(lease, "")
    return True
