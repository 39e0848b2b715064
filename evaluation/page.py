"""report.html: the verdict, the scores and the pictures on one page that runs nothing and links nowhere.

Every word that is not ours passes `_cell`: control and bidirectional marks go, length is capped, markup is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from evaluation.escape import clean
from evaluation.report import Record
from registry.records import Check, TaskScore

# No scripts, no network, pictures only from beside the page.
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
    "img{max-width:100%}"
)


def as_html(record: Record, title: str, pictures: Sequence[str] = ()) -> str:
    """The record as one HTML page; `pictures` are paths relative to the page ("plots/accuracy.png")."""
    parts = (
        f"<h1>{_cell(title)}</h1>",
        _judgement(record),
        _scores(record),
        _summary(record.summary),
        *(
            f'<p><img src="{escape(path, quote=True)}" alt="{escape(clean(path), quote=True)}"></p>'
            for path in pictures
        ),
    )
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_cell(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>'
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _judgement(record: Record) -> str:
    if not record.verdict:
        return "<p>Not judged by the gate.</p>"
    rows = [_check_row(check) for check in record.verdict.checks]
    return f"<p>Verdict: <b>{_cell(record.verdict.outcome)}</b></p>" + _table(("", "rule", "reason"), rows)


def _check_row(check: Check) -> tuple[str, str, str]:
    return "passed" if check.passed else "FAILED", check.rule, check.text


def _scores(record: Record) -> str:
    report = record.report
    rows = [_score_row(task, score) for task, score in report.scores.items()]
    alone = (("the expert alone", report.expert), ("the base", report.base))
    rows += [_score_row(f"{score.task} ({who})", score) for who, score in alone if score]
    return _table(("task", "metric", "value", "examples"), rows)


def _score_row(task: str, score: TaskScore) -> tuple[str, str, str, str]:
    return task, score.metric, score.error or f"{score.value:.3f}", str(score.examples)


def _summary(summary: Mapping[str, float]) -> str:
    rows = [(name.replace("_", " "), f"{value:.3f}") for name, value in summary.items()]
    return _table(("metric", "value"), rows) if rows else ""


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_cell(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{_cell(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    return escape(clean(text, 400), quote=True)
