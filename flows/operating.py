"""The verbs of who runs foldin: the nightly round, all services, MLflow's webhooks."""

import sys
from typing import Any, NoReturn

import click

from flows.telling import busy, say
from flows.verb import finish, prefect_for, prepared


@click.command(short_help="Fold what waits in few passes, verify, tidy up.")
@click.argument("line")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def nightly(options: dict[str, Any], line: str, as_json: bool) -> NoReturn:
    """The nightly round of LINE: fold several experts in one pass, verify the champion, collect garbage, tell."""
    with prefect_for(options, [line]):
        from flows.nightly import nightly as night
        from flows.nightly import summary

        facts = night(line, str(options["config_file"]))
    say(summary(facts))
    finish(facts["outcomes"], as_json)


@click.command(short_help="Receive MLflow's webhooks.")
@click.pass_obj
def receive(options: dict[str, Any]) -> None:
    """Receive MLflow's webhooks and wake the lines that they are about, until interrupted."""
    config = prepared(options)
    from flows.environment import webhook_secrets
    from flows.serve import named_prefect

    secrets = webhook_secrets()
    named_prefect()
    from flows.receiver import receive as keep_receiving

    keep_receiving(config, secrets)


@click.group(short_help="Have MLflow tell of new experts.")
def webhook() -> None:
    """Have MLflow tell `foldin receive` of new experts and moved aliases, or not any more."""


@webhook.command()
@click.pass_obj
def install(options: dict[str, Any]) -> None:
    """Have MLflow send webhooks to the address of [receiver], and try one."""
    config = prepared(options)
    busy("talking to MLflow")
    from flows.hints import EVENTS, subscribe

    refusal = subscribe(config)
    click.echo(f"{config.receiver.address}: {', '.join(EVENTS)}")
    if refusal:
        say(f"warning: {refusal}")
    else:
        say("A trial delivery arrived. MLflow looks for new webhooks once a minute.")
    sys.exit(1 if refusal else 0)


@webhook.command()
@click.pass_obj
def remove(options: dict[str, Any]) -> None:
    """Have MLflow send nothing to the address of [receiver] any more."""
    config = prepared(options)
    from flows.wiring import tracking_uri
    from registry.mlflow_webhooks import Webhooks

    count = Webhooks(tracking_uri(config), config.receiver.address).remove()
    say(f"{count} webhook{'s' * (count != 1)} removed.")


@click.command(short_help="Start everything on this machine.")
@click.option("--detach", is_flag=True, help="Return once everything answers.")
@click.pass_obj
def up(options: dict[str, Any], detach: bool) -> None:
    """Start PostgreSQL, a store, MLflow, Prefect, a worker of each pool and the receiver, and keep them running."""
    config = prepared(options)
    from flows import upkeep

    (upkeep.detach if detach else upkeep.up)(options["config_file"], config)


@click.command(short_help="End what `foldin up` started.")
@click.pass_obj
def down(options: dict[str, Any]) -> None:
    """End every service that `foldin up` keeps running."""
    config = prepared(options)
    from flows.upkeep import down as end

    say("All services ended." if end(config) else "Nothing runs.")
