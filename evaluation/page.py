"""report.html: the verdict, the reasons and the pictures on one page that runs nothing and links nowhere."""

from base64 import b64encode
from hashlib import sha256

from evaluation import sections
from evaluation.comparison import changes
from evaluation.headline import headline, rules
from evaluation.markup import cell, section
from evaluation.report import Record
from evaluation.style import STYLE

# Nothing is loaded, nothing runs, nothing is sent, and the one style sheet is the one below.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)


def as_html(record: Record, title: str, drawn: sections.Drawn | None = None) -> str:
    """The record as one HTML page; equal records give equal bytes.

    `drawn` is what `pictures` gives of the record, for a caller who needs several pages with the same pictures.
    """
    compared = changes(record)
    drawn = pictures(record) if drawn is None else drawn
    parts = (
        headline(record, title, compared),
        section("The gate's rules", rules(record)),
        sections.tasks(record, compared, drawn),
        sections.flips(record, compared),
        sections.history(record, drawn),
        sections.search(record, drawn),
        sections.layers(record, drawn),
        sections.lineage(record),
    )
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{cell(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    )
    return f"{head}<body><main>{''.join(parts)}</main></body></html>\n"


def pictures(record: Record) -> sections.Drawn:
    """Chart -> SVG; matplotlib is imported only for a record that has something to draw."""
    if not (record.champion or record.matrix or record.perplexities or record.tries or record.overlap):
        return {}
    from evaluation.charts import charts
    from evaluation.drawing import inline_svg

    return {name: inline_svg(chart) for name, chart in charts(record, changes(record)).items()}
