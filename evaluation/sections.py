"""The parts of the page below the rules. Each takes the record and its drawn charts, and is '' with nothing to say."""

from collections.abc import Mapping, Sequence

from evaluation import wording
from evaluation.comparison import Change
from evaluation.markup import Row, facts, figure, folded, paragraph, section, table
from evaluation.report import Record
from registry.verdicts import Flip, TaskScore, Try

Drawn = Mapping[str, str]  # chart -> its SVG
MOST_FLIPS = 24  # in the page; the answers lie beside it as Parquet
MOST_LAYERS = 400
CHANGES = (
    "Each mark is candidate minus champion, its bar the 95 % interval of the same examples' answers; right of the line "
    "is better. A cross stands for a task on which a rule failed."
)
MATRIX = "A row starts when its task arrived. ? could not be measured."
VERSIONS = "Dashed: the value with which the task arrived; tinted: worse than that. All share one scale."
PERPLEXITIES = "The same for perplexity, of which less is better; each task has its own scale."
TRIES = (
    "Further right keeps more of the old tasks, further up learns more of the new one. Circles joined by the line are "
    "the front: no other try is better on one side and as good on the other. Squares lie behind it, hollow marks would "
    "not pass the rules, the ring is around the chosen one. Numbers are those of the table."
)
LAYERS = (
    "A cosine near 0 means that the expert changes what earlier experts left alone; near 1 or −1 it pulls at the same "
    "weights. The share removed is what the merge did not let through, by squared norm."
)

COUNTED = ("task", "turned wrong#", "in %#", "turned right#", "net#", "examples#")
FLIPPED = ("task", "example", "right answer", "champion said", "candidate says")


def tasks(record: Record, changes: Sequence[Change], drawn: Drawn) -> str:
    """Candidate against champion; the scores alone when there is no champion."""
    if not changes:
        rows = [_alone(name, score) for name, score in record.report.scores.items()]
        inner = table("Scores", ("task", "metric", "value#", "examples#", "note"), rows) if rows else ""
        return section("Scores", inner)
    rows = [_against(change) for change in changes]
    heads = ("task", "change#", "95 % interval#", "champion#", "candidate#", "examples#", "metric", "note")
    chart = figure(drawn["tasks"], CHANGES) if "tasks" in drawn else ""
    note = "Accuracies and scores in per cent and points; perplexity as it is, its change in per cent of the champion's"
    return section("Candidate against champion", chart, table(note, heads, rows), paragraph(_bounds(record)))


def _against(change: Change) -> Row:
    score = change.after or change.before
    notes = ("new" * change.new, "safety" * change.safety, "rule failed" * change.failed, change.problem)
    values = (wording.measured(change.before), wording.measured(change.after))
    how = (str(change.examples) if not change.problem else "", score.metric if score else "")
    told = ", ".join(note for note in notes if note)
    moved = (wording.signed(change.value), wording.between(change.interval))
    return Row((change.task, *moved, *values, *how, told), "failed" * change.failed)


def _alone(name: str, score: TaskScore) -> Row:
    note = score.error or "safety" * score.safety
    return Row((name, score.metric, wording.measured(score), str(score.examples), note))


def _bounds(record: Record) -> str:
    """What the new task started from, and what the expert alone reaches."""
    report = record.report
    alone = (("the base", report.base), ("the expert alone", report.expert), ("the candidate", _new(record)))
    told = ", ".join(f"{who} {wording.measured(score)}" for who, score in alone if score)
    return f"On the new task {report.new_task}: {told}." if report.new_task and told else ""


def _new(record: Record) -> TaskScore | None:
    return record.report.scores.get(record.report.new_task)


def flips(record: Record, changes: Sequence[Change]) -> str:
    """How many answers turned, and a few that turned wrong."""
    rows = [_turned(each) for each in changes if each.wrong is not None and each.right is not None]
    counts = table("Answers that differ from the champion's", COUNTED, rows) if rows else ""
    examples = [_flip(flip) for flip in record.flips[:MOST_FLIPS]]
    some = table("Some that turned wrong", FLIPPED, examples, stacked=True) if examples else ""
    return section("Answers that flipped", counts, some)


def _turned(change: Change) -> Row:
    wrong, right = change.wrong or 0, change.right or 0
    net = f"{right - wrong:+d}".replace("-", wording.MINUS)
    rate = wording.percent(wrong / change.examples)
    return Row((change.task, str(wrong), rate, str(right), net, str(change.examples)), "failed" * change.failed)


def _flip(flip: Flip) -> Row:
    return Row((flip.task, flip.example, flip.wanted, flip.before, flip.after))


def history(record: Record, drawn: Drawn) -> str:
    """The accuracy matrix, the lines over versions, and what they add up to."""
    known = ((name, value) for name, value in record.summary.items() if "." not in name)
    sums = facts((name.replace("_", " "), wording.number(value)) for name, value in known)
    # A candidate that an earlier rung refused has no row.
    last = record.verdict is not None and record.verdict.rung == "full"
    captions = {
        "accuracy_matrix": MATRIX + " The last column is this candidate." * last,
        "versions": VERSIONS,
        "perplexities": PERPLEXITIES,
    }
    pictures = (figure(drawn[name], caption) for name, caption in captions.items() if name in drawn)
    return section("How the tasks fared so far", sums, *pictures)


def search(record: Record, drawn: Drawn) -> str:
    """The tries, and how they trade old tasks for the new one."""
    if not record.tries:
        return ""
    rows = [_try(place, each) for place, each in enumerate(record.tries, 1)]
    heads = ("no.", "try", "method", "parameters", "weight#", "old tasks#", "new task#", "answer", "why not")
    chart = figure(drawn["pareto"], TRIES) if "pareto" in drawn else ""
    return section("Search", chart, table("Tries, on the rows kept for tuning, in per cent", heads, rows, stacked=True))


def _try(place: int, each: Try) -> Row:
    words = ("chosen" * each.chosen, "on the front" * each.best, "passes" if each.passed else "would not pass")
    settings = ", ".join(f"{name} {value}" for name, value in each.parameters.items())
    values = (f"{each.weight:g}", wording.percent(each.old), wording.percent(each.new))
    told = ", ".join(word for word in words if word)
    first, _, more = each.reason.partition("; ")
    reason = f"{first}, and {more.count('; ') + 1} more" if more else first
    return Row((str(place), each.name, each.method, settings, *values, told, reason), "chosen" * each.chosen)


def layers(record: Record, drawn: Drawn) -> str:
    """Where in the model the expert met its predecessors."""
    if "overlap" not in drawn:
        return ""
    shown = list(record.overlap.items())[:MOST_LAYERS]
    columns = list(dict.fromkeys(name for _, values in shown for name in values))
    rows = [_layer(place, name, values, columns) for place, (name, values) in enumerate(shown, 1)]
    heads = ("no.", "layer", *(f"{name.replace('_', ' ')}#" for name in columns))
    inner = folded(f"{len(shown)} layers in numbers", table("Overlap per layer", heads, rows))
    return section("Overlap with what is already folded in", figure(drawn["overlap"], LAYERS), inner)


def _layer(place: int, name: str, values: Mapping[str, float], columns: Sequence[str]) -> Row:
    numbers = (wording.number(values[column]) if column in values else "" for column in columns)
    return Row((str(place), name, *numbers))


def lineage(record: Record) -> str:
    """Where the candidate comes from, to the digest."""
    known = {**record.lineage, "weights SHA-256": record.report.weights_sha256}
    return section("Lineage", facts(((name, text) for name, text in known.items() if text), "lineage"))
