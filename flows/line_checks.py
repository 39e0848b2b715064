"""What the keys of a line, and of its own tables, may say."""

import re
from difflib import get_close_matches
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from flows.access import MLFLOW, PREFECT
from flows.blackout import FORM, window_of
from flows.options import AccessConfig, RunnerConfig, SearchConfig
from flows.tables import EXAMPLES, check_number, refused

SEARCHES = ("never", "on-reject", "always")
FALLBACKS = ("never", "cpu")
MOST_AT_ONCE = 32  # experts of one pass; who takes its version back takes all of them back
POOL = re.compile(r"(?!prefect)[A-Za-z0-9][A-Za-z0-9_-]*")  # what Prefect takes; it keeps its own name for itself


def check_batch(path: Path, where: str, batch: float) -> None:
    """Nothing, when a pass can take so many experts; raises as `refused`."""
    check_number(path, where, batch, f"a whole number from 1 to {MOST_AT_ONCE}", 1, MOST_AT_ONCE, whole=True)


def check_blackout(path: Path, where: str, windows: tuple[str, ...]) -> None:
    """Nothing, when every text is a window of the week; raises as `refused`."""
    for text in windows:
        try:
            window_of(text)
        except ValueError as error:
            raise refused(path, f"{where} is no time of the week", FORM, repr(text)) from error


def check_timezone(path: Path, where: str, timezone: str) -> None:
    """Nothing, when it is a time zone; raises as `refused`."""
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:  # OSError: the name of a folder, such as America
        near = get_close_matches(timezone, available_timezones(), n=1)
        remedy = f"did you mean {near[0]!r}" if near else ""
        raise refused(path, f"{where} is unknown", "a name such as Europe/Paris", repr(timezone), remedy) from error


def check_runner(path: Path, where: str, runner: RunnerConfig) -> None:
    """Nothing, when a fold can be sent there; raises as `refused`."""
    if runner.pool and not POOL.fullmatch(runner.pool):
        raise refused(path, f"{where} pool names no work pool", "letters, digits, '_' and '-'", repr(runner.pool))
    if runner.fallback not in FALLBACKS:
        raise refused(path, f"{where} fallback is unknown", f"one of {', '.join(FALLBACKS)}", repr(runner.fallback))
    check_seconds(path, f"{where} patience", runner.patience, 0.0)


def check_access(path: Path, where: str, access: AccessConfig) -> None:
    """Nothing, when these are names that somebody can have: a mistyped one would shut everybody out, or nobody."""
    for key, doors in {"approve": {PREFECT}, "rollback": {PREFECT, MLFLOW}}.items():
        for name in getattr(access, key):
            if not name or name != name.strip() or (name.startswith("anyone@") and name not in doors):
                expected = f"accounts of the operating system, or {' or '.join(sorted(doors))}"
                raise refused(path, f"{where} {key} names nobody", expected, repr(name))


def check_search(path: Path, where: str, search: SearchConfig) -> None:
    """Nothing, when every way is one that can be tried; raises as `refused`."""
    if search.when not in SEARCHES:
        raise refused(path, f"{where} when is unknown", f"one of {', '.join(SEARCHES)}", repr(search.when))
    check_seconds(path, f"{where} seconds", search.seconds, 0.0)
    for key, (least, most) in {"strengths": (0.01, 100), "weights": (0.01, 100), "energies": (0, 0.99)}.items():
        for value in getattr(search, key):
            check_number(path, f"{where} {key}", value, f"numbers from {least:g} to {most:g}", least, most)
    check_number(path, f"{where} tries", search.tries, "a whole number from 1", 1, whole=True)


def check_experts(path: Path, where: str, line: str, experts: tuple[str, ...]) -> None:
    """Nothing, when MLflow can have these models, none the line's own: it would fold its own versions for ever."""
    wrong = [name for name in experts if not name.strip() or "/" in name or ":" in name]
    if not experts or wrong:
        found = repr(wrong[0]) if wrong else "[]"
        raise refused(path, f"{where} names no registered model", EXAMPLES["experts"], found)
    if line in experts:
        remedy = f"register experts under another name, such as {line}-experts"
        raise refused(path, f"{where} names the line's own registered model", "other models", repr(line), remedy)


def check_seconds(path: Path, where: str, value: float, least: float) -> None:
    """Nothing, when it is a time of that length or longer; raises as `refused`."""
    check_number(path, where, value, f"a number of seconds, {least:g} or more", least)
