"""The measured documents in benchmarks/out as docs/benchmarks.md, and the picture of the scaling benchmark beside it.

make bench                          measures
python -m benchmarks.report         writes docs/benchmarks.md and docs/benchmarks.png from what is there
"""

import argparse
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from benchmarks.drawing import draw
from benchmarks.targets import TARGETS, Facts, judged

MISSING = "Not measured yet."
WIDTH = 120
PREFACE = """\
Made by `python -m benchmarks.report` from what `make bench` measured; do not edit. The sides of a table ran in turns,
each run in a fresh process. Seconds are medians; memory is the peak of resident memory, files mapped into memory
included, beside what the imports alone take. Models are synthetic, files are in the system's cache."""


class Section(NamedTuple):
    """One benchmark in the document."""

    name: str  # of the program and its file
    title: str
    text: str
    figures: tuple[str, ...] = ()  # sections of the document that are shown as they are
    missing: str = MISSING
    layers: int | None = None  # of the model that the targets are about


SECTIONS = (
    Section(
        "step",
        "One fold against the published rule",
        "OPCM, the third expert into a total of two, vision tower of CLIP ViT-B/32 (12 layers, 768/3072, float32), "
        "from disk to disk. The reference is a transcription of the public implementation. Accuracy is the distance to "
        "the reference run in float64. `operations` says what each stage did and what the machine can do.",
        ("accuracy", "profile"),
        layers=12,
    ),
    Section(
        "stream",
        "A fold against copying its bytes",
        "The first expert into a decoder of 1.1 billion parameters (TinyLlama's shapes, bfloat16 shards), with the "
        "serving checkpoint. A copy reads and writes the same bytes and does nothing else.",
    ),
    Section(
        "adapters",
        "A LoRA adapter by its factors",
        "OPCM, the second adapter of rank 16 into a total of one, same decoder: kept as factors, or as the full "
        "checkpoints that the adapters stand for. The results are compared on a float32 decoder of two layers, because "
        "bfloat16 would round the densified experts.",
        ("agreement",),
        layers=22,
    ),
    Section(
        "parallel",
        "Many workers",
        "The fold of the first table by 1, 2, ... workers. All runs must write the same bytes.",
        ("bytes",),
        layers=12,
    ),
    Section(
        "scaling",
        "Against the number of experts and the model's size",
        "With the serving checkpoint. The first expert has no total to be projected on, so time is compared from the "
        "second on. Growth is the largest figure over the smallest.",
    ),
    Section(
        "gate",
        "Evaluating, against the forward passes alone",
        "Eight zero-shot suites of 500 texts on the demonstration's base, one process. `score_all` also reads suites, "
        "builds the model, tokenises and keeps every answer. `best` compares the fastest run of each side, `processor` "
        "processor time instead of the clock's.",
    ),
    Section(
        "peers",
        "Beside mergekit",
        "Two experts of 1.1 billion parameters merged: programs from start to end, imports included. The tools do not "
        "do the same: foldin also writes a float32 state and digests, and waits for the disk.",
        ("agreement", "imports", "peers"),
    ),
    Section(
        "published",
        "Whether the transcription is fair",
        "The real fusion-bench on the same tower, beside its transcription; `step_seconds` is the third expert alone.",
        ("agreement",),
    ),
    Section(
        "gpu",
        "On a GPU",
        "OPCM on all tensors of the shapes of Llama 7B, made on the device; the seconds of a process include making "
        "them, `fold_seconds` and `read_seconds` do not. The reference is one matrix of each shape, gesvd with full "
        "bases, scaled up by how many there are. Parity is ||GPU - CPU|| / ||CPU|| of one projection.",
        ("device", "reference", "parity"),
        "Not measured: no GPU was at hand. `python -m benchmarks.gpu` runs wherever there is one.",
        layers=32,
    ),
)


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables of what was measured.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/out"), help="folder of NAME.json")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="and its picture, .png")
    chosen = parser.parse_args()
    found = {section.name: chosen.results / f"{section.name}.json" for section in SECTIONS}
    documents = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    picture = chosen.out.with_suffix(".png")
    if "scaling" in documents:
        draw(documents["scaling"], picture)
    chosen.out.write_text(written(documents, picture.name))
    print(chosen.out)


def written(documents: dict[str, Facts], picture: str) -> str:
    """The whole text; `picture` is the file beside it."""
    lines = [
        "# What a fold costs",
        "",
        PREFACE,
    ]
    for section in SECTIONS:
        about = fill(f"`python -m benchmarks.{section.name}`. {section.text}", WIDTH, break_on_hyphens=False)
        lines += ["", f"## {section.title}", "", about, ""]
        facts = documents.get(section.name)
        lines += [section.missing] if facts is None else _measured(section, facts)
        if facts is not None and section.name == "scaling":
            lines += ["", f"![Time and memory per fold against the number of experts and the model's size]({picture})"]
    return "\n".join(lines) + "\n"


def _measured(section: Section, facts: Facts) -> Iterator[str]:
    """The lines of one benchmark that was run."""
    where, parameters = facts["machine"], facts["parameters"]
    quick = bool(parameters.get("quick")) or facts.get("device", {}).get("name") == "cpu"
    yield from _reservations(section, facts, quick)
    machine = f"{facts['date'][:10]}, {where['cpu']}, {where['cores']} cores, {where['memory_gb']} GiB, {where['os']}"
    software = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    told = f"{machine}; {software}; {facts['threads']} threads."
    yield from (fill(told, WIDTH, break_on_hyphens=False), f"`{_command(facts['command'])}`", "")
    yield from table(("side", "runs", "seconds", "min", "max", "peak MiB", "imports MiB"), _sides(facts))
    if section.name in TARGETS:
        verdicts = [(target.what, *judged(target, facts)) for target in TARGETS[section.name]]
        rows = [(what, wanted, found, "-" if quick else verdict) for what, wanted, found, verdict in verdicts]
        yield from ("", *table(("target", "wanted", "measured", "verdict"), rows))
    shown = {"ratios": facts["ratios"], **{key: facts[key] for key in section.figures if key in facts}}
    figures = [(key, name, text) for key, each in shown.items() for name, text in _figures(each)]
    if figures:
        yield from ("", *table(("figures", "what", "value"), figures))


def _reservations(section: Section, facts: Facts, quick: bool) -> Iterator[str]:
    """What keeps the figures from being those of the target."""
    layers, repeats = facts["parameters"].get("layers"), facts["parameters"]["repeats"]
    if quick:
        yield from ("**A quick run: it shows that the program works, and measures nothing.**", "")
        return
    if repeats < 5:
        yield from (f"**Only {repeats} runs of each side, so no evidence yet.**", "")
    if section.layers is not None and layers != section.layers:
        yield from (f"**{layers} layers only; the targets are about {section.layers}.**", "")


def _figures(found: Facts, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested figures as names and texts; a spread is one text."""
    for key, value in found.items():
        if isinstance(value, Mapping) and value.keys() == {"median", "min", "max"}:
            yield f"{prefix}{key}", f"{value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})"
        elif isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _sides(facts: Facts) -> Iterator[tuple[str, ...]]:
    for name, side in facts["sides"].items():
        seconds = side["seconds"]
        times = [f"{seconds[key]:.3f}" for key in ("median", "min", "max")]
        memory = ["-" if side[key] is None else f"{side[key]:.0f}" for key in ("peak_rss_mb", "baseline_rss_mb")]
        yield (name, str(len(seconds["all"])), *times, *memory)


def table(head: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The lines of a table in Markdown.

    >>> list(table(("a", "b"), [("1", "x | y")]))
    ['| a | b |', '|---|---|', '| 1 | x \\\\| y |']
    """
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _command(text: str) -> str:
    """The command without the places of files on the machine where it ran."""
    words, kept = iter(shlex.split(text)), list[str]()
    for word in words:
        if word in ("--keep", "--plot", "--peers"):
            next(words, None)
        elif not word.startswith(("--keep=", "--plot=", "--peers=")):
            kept.append(word)
    return shlex.join(kept)


if __name__ == "__main__":
    main()
