"""The verbs with which a person decides about a version that waits."""

import getpass
from typing import Any

import click

from flows.telling import say
from flows.verb import prefect_for


def _words(context: click.Context, option: click.Parameter, text: str) -> str:
    """A reason is kept for ever; an empty one is no reason."""
    if not text.strip():
        raise click.BadParameter("give a reason")
    return text


because = click.option("--because", required=True, callback=_words, help="Why; kept in the line's history.")


@click.command()
@click.argument("line")
@click.argument("version", type=int)
@because
@click.pass_obj
def approve(options: dict[str, Any], line: str, version: int, because: str) -> None:
    """Make VERSION of LINE, which waits for a person, the champion; verified first."""
    with prefect_for(options, [line], check=False):
        from flows.approval import approve as decide

        decide(line, version, because, getpass.getuser(), str(options["config_file"]))
    click.echo(f"{line}: v{version} approved")
    say(f"Next: foldin watch {line}")


@click.command()
@click.argument("line")
@click.argument("version", type=int)
@because
@click.pass_obj
def reject(options: dict[str, Any], line: str, version: int, because: str) -> None:
    """Reject the expert that VERSION of LINE, which waits for a person, was made with; the champion stays."""
    with prefect_for(options, [line], check=False):
        from flows.approval import reject as decide

        decide(line, version, because, getpass.getuser(), str(options["config_file"]))
    click.echo(f"{line}: v{version} declined")
    say(f"Next: foldin watch {line}")
