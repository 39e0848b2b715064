"""The top of the page: what was decided, where, why, how much it costs the users, and what it took."""

import math
from collections.abc import Sequence

from evaluation import wording
from evaluation.comparison import Change
from evaluation.markup import Row, cell, facts, folded, paragraph, table
from evaluation.report import Record
from registry.verdicts import Check, Outcome

MARKS = {Outcome.PASSED: ("✓", "passed"), Outcome.REJECTED: ("✕", "rejected"), Outcome.WAITING: ("?", "waiting")}
WORDS_FIRST = ("line", "expert", "task", "parent", "method")  # of the lineage, which people ask for first
MOST_REASONS = 3
MOST_PASSED = 4  # rules that do not push what follows off the screen


def headline(record: Record, title: str, changes: Sequence[Change]) -> str:
    """Title, verdict with the first reasons, and the numbers that matter."""
    known = [(name, record.lineage[name]) for name in WORDS_FIRST if record.lineage.get(name)]
    whence = " · ".join(f"{name} {text}" for name, text in known)
    return (
        f"<header><h1>{cell(title)}</h1>{paragraph(whence, 'quiet') if whence else ''}{_verdict(record)}"
        f"{facts(_at_a_glance(record, changes), 'tiles')}{_took(record)}</header>"
    )


def _verdict(record: Record) -> str:
    outcome = record.verdict.outcome if record.verdict else None
    mark, kind = MARKS.get(outcome, ("–", "waiting")) if outcome else ("–", "unjudged")
    words = f'<p class="said"><span aria-hidden="true">{mark}</span> {cell(wording.decided(record.verdict))}</p>'
    failed = _failed_first(record)[: sum(not check.passed for check in record.verdict.checks)] if record.verdict else []
    reasons = "".join(f"<li>{cell(check.text)}</li>" for check in failed[:MOST_REASONS])
    more = paragraph(f"and {len(failed) - MOST_REASONS} more, below") if len(failed) > MOST_REASONS else ""
    return f'<div class="verdict {kind}">{words}{f"<ul>{reasons}</ul>" if reasons else ""}{more}</div>'


def _at_a_glance(record: Record, changes: Sequence[Change]) -> list[tuple[str, str]]:
    known = [each for each in changes if math.isfinite(each.value) and not each.is_perplexity]
    old = [each for each in known if not each.new]
    tiles = [
        (f"new task: {each.task}", f"{wording.measured(each.after)} % ({wording.signed(each.value)})")
        for each in known
        if each.new
    ]
    if old:
        worst = min(old, key=lambda each: each.value)
        mean = math.fsum(each.value for each in old) / len(old)
        tiles += [(f"mean change of {len(old)} known task{'s' * (len(old) > 1)}", f"{wording.signed(mean)} points")]
        tiles += [(f"furthest down: {worst.task}", f"{wording.signed(worst.value)} points")] if worst.value < 0 else []
    rising = [each for each in changes if each.is_perplexity and not each.new and each.value > 0]
    if rising:
        most = max(rising, key=lambda each: each.value)
        tiles += [(f"perplexity furthest up: {most.task}", f"{wording.signed(most.value)} %")]
    asked = [each for each in old if each.wrong is not None]
    if asked:
        wrong, whole = sum(each.wrong or 0 for each in asked), sum(each.examples for each in asked)
        tiles += [("answers that turned wrong", f"{wrong} of {whole}")]
    unknown = sum(bool(each.problem) for each in changes)
    return tiles + ([("tasks not measured", str(unknown))] if unknown and record.report.scores else [])


def _took(record: Record) -> str:
    if not record.seconds:
        return ""
    each = ", ".join(f"{name} {wording.duration(seconds)}" for name, seconds in record.seconds.items())
    whole = wording.duration(math.fsum(record.seconds.values()))
    return paragraph(f"Judging took {whole}: {each}.", "quiet")


def rules(record: Record) -> str:
    """The gate's rules as a table, failed ones first."""
    heads = ("verdict", "rung", "rule", "task", "value#", "threshold#", "95 % interval#", "why")
    rows = [_rule(check) for check in _failed_first(record)]
    failed = [row for row in rows if row.kind]
    passed = rows[len(failed) :]
    if not failed or len(passed) <= MOST_PASSED:
        return table("What the gate asked, failed rules first", heads, rows, stacked=True) if rows else ""
    others = folded(f"{len(passed)} rules passed", table("Rules that passed", heads, passed, stacked=True))
    return table("Rules that failed", heads, failed, stacked=True) + others


def _rule(check: Check) -> Row:
    interval = f"{wording.number(check.interval[0])} to {wording.number(check.interval[1])}" if check.interval else ""
    cells = (check.rung, check.rule, check.task or "all", wording.number(check.value), wording.number(check.threshold))
    return Row((wording.answer(check), *cells, interval, check.text), "" if check.passed else "failed")


def _failed_first(record: Record) -> list[Check]:
    checks = record.verdict.checks if record.verdict else ()
    return sorted(checks, key=lambda check: (check.passed, not check.hard))
