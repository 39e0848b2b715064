"""The flow that makes an earlier version the champion again."""

from prefect import flow

from flows.access import admitted
from flows.champion import roll_back
from flows.leasing import held
from flows.telling import say
from flows.versions import chain
from flows.wiring import house
from registry.records import FoldinError, Refusal


@flow(name="rollback", flow_run_name="roll back {line}", persist_result=False)
def rollback(
    line: str, because: str, to: int | None = None, who: str = "a person", config_file: str = "foldin.toml"
) -> dict[str, int | None]:
    """Move the champion to version `to` (its parent when None), verified first; a fold that runs can write no more.

    Raises:
        FoldinError: E_ACCESS when the line lets others do that; E_VERSION, E_GATE or E_DIGEST when the target may not
            be champion. The champion is then unchanged.
    """
    at = house(config_file)
    who = admitted(at.config.line(line), line, "rollback", who)
    before = at.ledger.line(line).champion
    target = to if to is not None else _parent(line, chain(at, line, before) if before else [])
    with held(at, line, seize=True) as lease:
        move = roll_back(at, lease, target, because, who)
    say(f"{line}@champion: version {move.origin} -> {move.target}")
    return {"from": move.origin, "to": move.target}


def _parent(line: str, ancestors: list[int]) -> int:
    if len(ancestors) > 1:
        return ancestors[1]
    raise FoldinError(
        Refusal(
            code="E_VERSION",
            what="there is no version before the champion",
            where=f"line {line}",
            found="the base is champion" if ancestors else "no champion",
            remedy="name the version with --to",
        )
    )
