"""The verbs that read: what a line stands at, its history, one version, its report."""

from pathlib import Path
from typing import Any

import click

from flows.telling import say
from flows.verb import answer, house_of


@click.command(short_help="What every line stands at.")
@click.argument("line", required=False)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def status(options: dict[str, Any], line: str | None, as_json: bool) -> None:
    """What every line stands at: champion, what waits, what was refused."""
    house = house_of(options)
    from flows.printing import print_status
    from flows.reading import status as read

    facts = [read(house, name) for name in ([line] if line else [each.name for each in house.ledger.lines()])]
    answer(facts, as_json, print_status)


@click.command(short_help="The lineage of a line, as a tree.")
@click.argument("line")
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.option("--mermaid", "as_mermaid", is_flag=True, help="The tree as a Mermaid flowchart.")
@click.pass_obj
def log(options: dict[str, Any], line: str, as_json: bool, as_mermaid: bool) -> None:
    """The lineage of LINE: its versions as a tree with what it refused, and the moves of its champion."""
    from flows.mermaid import mermaid
    from flows.printing import print_log
    from flows.reading import log as read

    facts = read(house_of(options), line)
    answer(facts, as_json, (lambda found: click.echo(mermaid(found))) if as_mermaid else print_log)


@click.command(short_help="What is in a version.")
@click.argument("line")
@click.argument("version", type=int, required=False)
@click.option("--expert", help="Instead: every version that holds this expert, MODEL vN or its task.")
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.pass_obj
def show(options: dict[str, Any], line: str, version: int | None, expert: str | None, as_json: bool) -> None:
    """One VERSION of LINE (the champion by default): what is in it, how it was judged, how good it is."""
    house = house_of(options)
    from flows.printing import print_holders, print_show
    from flows.reading import holders
    from flows.reading import show as read

    if expert:
        answer(holders(house, line, expert), as_json, print_holders)
    else:
        answer(read(house, line, version), as_json, print_show)


@click.command(short_help="What changed between two versions.")
@click.argument("line")
@click.argument("before", type=int)
@click.argument("after", type=int)
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.pass_obj
def diff(options: dict[str, Any], line: str, before: int, after: int, as_json: bool) -> None:
    """What changed from version BEFORE of LINE to AFTER: experts, tasks, layers."""
    from flows.differing import difference, print_difference

    answer(difference(house_of(options), line, before, after), as_json, print_difference)


@click.command(short_help="Measure a version on its suites.")
@click.argument("line")
@click.argument("version", type=int, required=False)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def score(options: dict[str, Any], line: str, version: int | None, as_json: bool) -> None:
    """Measure one VERSION of LINE (the champion by default) on every task the champion knows."""
    from flows.printing import print_scores
    from flows.reading import score as read

    facts = read(house_of(options), line, version)
    answer(facts, as_json, lambda found: print_scores(found["scores"]))
    for task, error in facts["errors"].items():
        say(f"{task} was not measured: {error}")


@click.command(short_help="The report of a version, or of a rejected expert.")
@click.argument("line")
@click.argument("version", type=int, required=False)
@click.option("--expert", help="The report of what became of this expert, folded or rejected: MODEL vN.")
@click.option("--to", type=click.Path(path_type=Path), help="Copy the page to this file.")
@click.pass_obj
def report(options: dict[str, Any], line: str, version: int | None, expert: str | None, to: Path | None) -> None:
    """Where the report of a VERSION of LINE (the champion by default) is: one page, readable without network."""
    house = house_of(options)
    from flows.reading import page_of, show

    page = page_of(house, line, expert) if expert else Path(show(house, line, version)["report"])
    if to:
        to.write_bytes(page.read_bytes())
    click.echo(str(to or page))
