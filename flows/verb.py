"""What every verb of the command line needs: its settings, a Prefect server, how it answers and how it ends."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import click

from flows.telling import busy, complain, speak

if TYPE_CHECKING:
    from flows.config import Config
    from flows.wiring import House

REJECTED = 3


def prepared(options: dict[str, Any]) -> "Config":
    """The configuration, with the environment set before anything slow is imported."""
    from flows.config import load
    from flows.environment import prepare_environment

    config = load(options["config_file"])
    prepare_environment(config, verbose=options["debug"])
    speak(not options["quiet"])
    return config


def house_of(options: dict[str, Any]) -> "House":
    """Ledger, registry and folders, as the settings say."""
    from flows.wiring import house

    check_stack(prepared(options))
    return house(str(options["config_file"]))


def check_stack(config: "Config") -> None:
    """Nothing, unless the registry is that of `foldin up` and it does not run.

    Raises:
        FoldinError: E_SERVER.
    """
    from flows.environment import offered
    from registry.records import FoldinError, Refusal

    if str(config.home / "stack") in unquote(config.registry.ledger_url) and not offered(config):
        what, where, remedy = (
            "the services that it names do not run",
            "[registry] of foldin.toml",
            "`foldin up --detach`",
        )
        raise FoldinError(Refusal("E_SERVER", what, where, remedy=f"start them with {remedy}"))


@contextmanager
def prefect_for(options: dict[str, Any], lines: Sequence[str], *, check: bool = True) -> Iterator[None]:
    """A Prefect API for the flow runs of one verb; what can be checked is checked while its server starts."""
    config = prepared(options)
    check_stack(config)
    settings = {line: config.line(line) for line in lines}
    from flows.serve import temporary_prefect
    from flows.wiring import house

    # One line's mistake is not the others': of several, each is checked in its own flow run.
    checked = settings if check and len(settings) == 1 else {}

    def meanwhile() -> None:
        from flows.settings import check_settings

        for line, each in checked.items():
            check_settings(each, line)
        _ = house(str(options["config_file"])).mlflow  # imports for seconds, which the server needs to start too

    busy("starting Prefect")
    with temporary_prefect(config, meanwhile):
        yield


def answer(facts: Any, as_json: bool, show: Callable[[Any], None]) -> None:  # noqa: ANN401 - any JSON
    """Put what was asked for on stdout, as JSON or by `show`."""
    if as_json:
        click.echo(json.dumps(facts, indent=1, default=str))
    else:
        show(facts)


def finish(outcomes: list[dict[str, Any]], as_json: bool) -> NoReturn:
    """Say what became of the experts; exit 3 when the gate rejected one, 1 when intake refused one."""
    if as_json:
        click.echo(json.dumps(outcomes, indent=1))
    else:
        for outcome in outcomes:
            version = f" as v{outcome['version']}" if outcome["version"] else ""
            click.echo(f"{outcome['expert']}: {outcome['state']}{version}")
    states = {outcome["state"] for outcome in outcomes}
    sys.exit(REJECTED if "rejected" in states else int("quarantined" in states))


def fail(text: str, code: int) -> NoReturn:
    """End with one line of error."""
    complain(text)
    sys.exit(code)
