"""The verbs with which a person decides: what waits, which version serves, which experts are in it."""

import sys
from typing import Any, NoReturn

import click

from flows.access import account
from flows.telling import say
from flows.verb import REJECTED, answer, house_of, prefect_for


def _words(context: click.Context, option: click.Parameter, text: str) -> str:
    """A reason is kept for ever; an empty one is no reason."""
    if not text.strip():
        raise click.BadParameter("give a reason")
    return text


because = click.option("--because", required=True, callback=_words, help="Why; kept in the line's history.")


@click.command(short_help="Make a version that waits for a person the champion.")
@click.argument("line")
@click.argument("version", type=int)
@because
@click.pass_obj
def approve(options: dict[str, Any], line: str, version: int, because: str) -> None:
    """Make VERSION of LINE, which waits for a person, the champion; verified first."""
    with prefect_for(options, [line], check=False):
        from flows.approval import approve as decide

        decide(line, version, because, account(), str(options["config_file"]))
    click.echo(f"{line}: v{version} approved")
    say(f"Next: foldin watch {line}")


@click.command(short_help="Reject the expert of a version that waits.")
@click.argument("line")
@click.argument("version", type=int)
@because
@click.pass_obj
def reject(options: dict[str, Any], line: str, version: int, because: str) -> None:
    """Reject the expert that VERSION of LINE, which waits for a person, was made with; the champion stays."""
    with prefect_for(options, [line], check=False):
        from flows.approval import reject as decide

        decide(line, version, because, account(), str(options["config_file"]))
    click.echo(f"{line}: v{version} declined")
    say(f"Next: foldin watch {line}")


@click.command(short_help="Make an earlier version the champion again.")
@click.argument("line")
@click.option("--to", type=int, help="Version; default: the champion's parent.")
@because
@click.pass_obj
def rollback(options: dict[str, Any], line: str, to: int | None, because: str) -> None:
    """Make an earlier (or later) version of LINE the champion, verified first."""
    with prefect_for(options, [line], check=False):  # it needs none of them, and must work when they are wrong
        from flows.rollback import rollback as roll_back

        moved = roll_back(line, because, to, account(), str(options["config_file"]))
    click.echo(f"{line}: v{moved['from']} -> v{moved['to']}")
    say(f"Next: foldin log {line}")


@click.command(short_help="Rebuild a line without some experts.")
@click.argument("line")
@click.option(
    "--without", multiple=True, help="Expert to leave out: MODEL vN, or its task. May be given several times."
)
@click.option("--order", multiple=True, help="All that are kept, in the order of folding; once for each expert.")
@click.option("--promote", is_flag=True, help="Make the result the champion, if the gate finds it no worse.")
@because
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.pass_obj
def replay(
    options: dict[str, Any],
    line: str,
    without: tuple[str, ...],
    order: tuple[str, ...],
    promote: bool,
    because: str,
    as_json: bool,
) -> NoReturn:
    """Rebuild LINE without some experts, or in another order, as if it had never seen them; beside the champion."""
    with prefect_for(options, [line]):
        from flows.replay import replay as rebuild

        who, file = account(), str(options["config_file"])
        facts = rebuild(line, because, list(without), list(order), promote, who, file)
    from flows.printing import print_replay

    answer(facts, as_json, print_replay)
    sys.exit(0 if facts["verdict"] == "passed" else REJECTED)


@click.command(short_help="What takes room and nobody needs.")
@click.argument("line")
@click.option(
    "--keep", type=click.IntRange(min=0), help="Versions before the champion that stay; default: [registry] keep."
)
@click.option(
    "--keep-thin",
    type=click.IntRange(min=0),
    help="The same, that stay but for their serving weights; default: [registry] keep_thin.",
)
@click.option("--yes", is_flag=True, help="Do it; without, only say what would go.")
@click.option("--restore", "back", type=int, help="Instead: make the serving weights of this thin version again.")
@click.option("--because", default="foldin gc", help="Kept in the line's history.")
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.pass_obj
def gc(
    options: dict[str, Any],
    line: str,
    keep: int | None,
    keep_thin: int | None,
    yes: bool,
    back: int | None,
    because: str,
    as_json: bool,
) -> None:
    """What of LINE takes room and nobody needs; with --yes it goes. Old versions can get their weights back."""
    house = house_of(options)
    from flows.collecting import Keep, garbage, had_again
    from flows.printing import print_garbage

    if back is not None:
        had_again(house, line, back, because, account())
        click.echo(f"{line}: v{back} is whole")
        return
    ours = house.config.registry
    many = Keep(int(ours.keep) if keep is None else keep, int(ours.keep_thin) if keep_thin is None else keep_thin)
    answer(garbage(house, line, many, because, account(), yes=yes), as_json, print_garbage)


@click.command(short_help="Let an expert be folded again.")
@click.argument("line")
@click.argument("expert")
@because
@click.pass_obj
def requeue(options: dict[str, Any], line: str, expert: str, because: str) -> None:
    """Put an EXPERT of LINE that was rejected, set aside, withdrawn or rolled back at the end of the queue again."""
    from flows.requeue import requeue as again

    name = again(house_of(options), line, expert, because, account())
    click.echo(f"{name}: pending")
    say(f"Next: foldin watch {line}")


@click.command(short_help="Keep experts as compressed changes, for replays.")
@click.argument("line")
@click.argument("experts", nargs=-1)
@click.option(
    "--tolerance", default=0.01, show_default=True, help="Largest error of a tensor's change, relative to it."
)
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
@click.pass_obj
def archive(options: dict[str, Any], line: str, experts: tuple[str, ...], tolerance: float, as_json: bool) -> None:
    """Keep EXPERTS that the champion of LINE holds, or all of them, as compressed changes, for replays."""
    house = house_of(options)
    from flows.archive_table import print_archives
    from flows.archiving import archive as keep

    rows = keep(house, line, experts, tolerance, account())
    answer(rows, as_json, print_archives)
    reasons = [row["reason"] for row in rows if row["reason"]]
    for reason in reasons:
        click.echo(f"error: {reason}", err=True)
    sys.exit(1 if reasons else 0)
