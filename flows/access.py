"""Who asks for a decision, what their name is worth, and whether the line lets them.

The command line's name comes from the kernel. Prefect's open-source server knows no users, and MLflow keeps no author
of an alias: of what comes through them only that somebody may write there is known (docs/access.md).
"""

import os
import pwd
from pathlib import Path

from flows.options import LineConfig
from registry.records import FoldinError, Refusal

PREFECT, MLFLOW = "anyone@prefect", "anyone@mlflow"
UNSET = 2**32 - 1  # the kernel's word for: nobody logged in
LONGEST = 100  # characters, of a name that somebody wrote


def account(login: Path = Path("/proc/self/loginuid")) -> str:
    """The account that this process works for: who logged in, also behind sudo; where that is not kept, the process's.

    Both are the kernel's word. LOGNAME and USER are not asked: everybody can set them.
    """
    try:
        number = int(login.read_text(encoding="ascii"))
    except (OSError, ValueError):
        number = UNSET
    if number == UNSET:
        number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


def admitted(settings: LineConfig, line: str, verb: str, who: str) -> str:
    """The name that the line's history keeps of who asks to `approve` (or reject) or to `rollback`.

    Where the line names people, it is the account of this process that counts, whatever `who` says.

    Raises:
        FoldinError: E_ACCESS when the line names people and this is none of them, or a run of a deployment in Prefect.
    """
    names = named(settings, verb)
    if _asked_in_prefect():
        if names and PREFECT not in names:
            what = "the line names who may do that, and Prefect does not say who asks"
            raise _refused(line, verb, what, "somebody who may write to Prefect", names)
        return f"{who[:LONGEST]} (unverified, through Prefect)"
    if not names:
        return who
    me = account()
    if me not in names or me in {PREFECT, MLFLOW}:
        raise _refused(line, verb, "the line names who may do that, and you are not among them", me, names)
    return me


def check_alias(settings: LineConfig, line: str, version: int) -> None:
    """Nothing, when a move of the alias in MLflow counts as a rollback.

    Raises:
        FoldinError: E_ACCESS when the line names who may roll back, and not `anyone@mlflow`.
    """
    names = named(settings, "rollback")
    if not names or MLFLOW in names:
        return
    what = "the line names who may roll back, and MLflow does not say who moved the alias"
    raise FoldinError(
        Refusal(
            code="E_ACCESS",
            what=what,
            where=f"{line} v{version}",
            expected=f"one of {', '.join(names)}",
            remedy=f"one of them confirms it with `foldin rollback {line} --to {version}`, or the alias is moved back",
        )
    )


def asks_in_prefect(settings: LineConfig) -> bool:
    """Whether the answer to a form in Prefect counts, so that there shall be one."""
    names = named(settings, "approve")
    return not names or PREFECT in names


def named(settings: LineConfig, verb: str) -> tuple[str, ...]:
    """Who may `approve` or `rollback` a line; () for anybody."""
    return {"approve": settings.access.approve, "rollback": settings.access.rollback}[verb]


def _asked_in_prefect() -> bool:
    """Whether this is a run of a deployment, which whoever may write to the Prefect API can start, with any answer."""
    from prefect.runtime import deployment

    return bool(deployment.get_id())


def _refused(line: str, verb: str, what: str, found: str, names: tuple[str, ...]) -> FoldinError:
    where, expected = f"line {line}", f"one of {', '.join(names)}"
    remedy = f"ask one of them; [lines.{line}.access] {verb} of foldin.toml names them"
    return FoldinError(Refusal("E_ACCESS", what, where, expected=expected, found=found, remedy=remedy))
