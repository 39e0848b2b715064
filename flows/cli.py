"""The command line. Verbs are the names of flows and of the functions behind them; slow imports stay inside the verbs.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 error, 2 usage, 3 rejected by the gate.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from flows.asking import diff, log, report, score, show, status
from flows.hiding import show_traceback
from flows.operating import down, nightly, receive, up, webhook
from flows.people import approve, archive, gc, reject, replay, requeue, rollback
from flows.telling import busy, say
from flows.verb import fail, finish, house_of, prefect_for, prepared


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "config_file", default="foldin.toml", type=click.Path(path_type=Path), help="Default: foldin.toml."
)
@click.option("--quiet", is_flag=True, help="Say nothing on stderr but errors.")
@click.option("--debug", is_flag=True, help="Show tracebacks and Prefect's own log.")
@click.version_option(package_name="foldin")
@click.pass_context
def cli(context: click.Context, config_file: Path, quiet: bool, debug: bool) -> None:
    """Keep one model learning from many: fold, gate, register, roll back."""
    context.obj = {"config_file": config_file.absolute(), "quiet": quiet, "debug": debug}


@cli.command(short_help="The whole loop on a real model, offline.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the facts of the run to a file.")
@click.option("--home", default=".foldin-demo", type=click.Path(path_type=Path), help="Where the demonstration lives.")
@click.option(
    "--base", type=click.Path(path_type=Path), help="Folder of all-MiniLM-L6-v2; default: the Python package."
)
@click.option(
    "--backend",
    type=click.Choice(["embedded", "servers"]),
    default="embedded",
    show_default=True,
    help="servers: MLflow on PostgreSQL, files in S3, started for the run.",
)
@click.pass_obj
def demo(options: dict[str, Any], json_file: Path | None, home: Path, base: Path | None, backend: str) -> None:
    """Fold five real experts, refuse two bad ones, roll back and forward: the whole loop, offline."""
    from flows.demo import run

    run(home.absolute(), base, json_file, backend=backend, debug=options["debug"])


@cli.command(short_help="Start a line with its base.")
@click.argument("line")
@click.option("--base", type=click.Path(path_type=Path), help="Folder with config.json and *.safetensors.")
@click.option("--experts", multiple=True, help="Registered model to watch; default: LINE-experts.")
@click.option("--method", help="Merge method; default: opcm.")
@click.pass_obj
def init(options: dict[str, Any], line: str, base: Path | None, experts: tuple[str, ...], method: str | None) -> None:
    """Start a line: write it into foldin.toml and register its base as version 1."""
    from flows.setup import write_line

    write_line(options["config_file"], line, base.absolute() if base else None, list(experts), method)
    house = house_of(options)
    busy("registering the base")
    from flows.starting import start

    version = start(house, line, house.config.line(line))
    watched = ", ".join(house.config.line(line).experts)
    say(f"{line} v{version} is the base and champion. Experts registered as {watched} will be folded.")
    say(
        f"Next: foldin add DIR --line {line} --task TASK (or register with any MLflow client), then foldin watch {line}"
    )


@cli.command(short_help="Register a folder as an expert.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--line", required=True, help="Line whose registered model it joins.")
@click.option("--task", required=True, help="What it was trained for.")
@click.option("--suite", type=click.Path(path_type=Path), help="suite.json with its data beside it.")
@click.option("--model", help="Registered model, when the line watches several.")
@click.pass_obj
def add(options: dict[str, Any], folder: Path, line: str, task: str, suite: Path | None, model: str | None) -> None:
    """Register the expert in FOLDER."""
    from flows.setup import add_expert

    name, version = add_expert(house_of(options), line, folder, task, suite, model)
    click.echo(f"{name} v{version}")
    say(f"Next: foldin watch {line}")


@cli.command(short_help="Keep watching, on an interval or a schedule.")
@click.option("--limit", default=8, show_default=True, help="Flow runs at a time.")
@click.pass_obj
def serve(options: dict[str, Any], limit: int) -> None:
    """Keep every line's deployments running: watch on an interval, nightly on its cron, rollback on demand."""
    config = prepared(options)
    from flows.serve import serve as keep_serving

    keep_serving(config, str(options["config_file"]), limit)


@cli.command(short_help="Look once, and fold what waits.")
@click.argument("line", required=False)
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def watch(options: dict[str, Any], line: str | None, as_json: bool) -> NoReturn:
    """Look once: adopt moves of the alias, enrol new experts, fold everything that waits. All lines by default."""
    from registry.records import ExpertState, FoldinError

    config = prepared(options)
    names = [line] if line else sorted(config.lines)
    outcomes, errors = [], []
    with prefect_for(options, names):
        from flows.champion import blocked
        from flows.watch import watch as look
        from flows.wiring import house

        for name in names:
            try:
                outcomes += look(name, str(options["config_file"]))
                refusal = blocked(house(str(options["config_file"])), name)
                errors += [FoldinError(refusal)] if refusal else []
            except FoldinError as error:  # one line's trouble is not the others'
                errors.append(error)
        if not (errors or outcomes):
            at = house(str(options["config_file"]))
            idle = [name for name in names if not at.ledger.experts(name, ExpertState.PENDING)]
            if idle or not names:
                say(f"{', '.join(idle) or 'no line'}: nothing new was found, nothing to fold")
    for other in errors[1:]:
        say(f"error: {other}")
    if errors:
        raise errors[0]
    finish(outcomes, as_json)


@cli.command(short_help="Fold the next expert that waits.")
@click.argument("line")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def merge(options: dict[str, Any], line: str, as_json: bool) -> NoReturn:
    """Fold the next expert that waits in LINE, and no more."""
    with prefect_for(options, [line]):
        from flows.merge import merge_expert

        outcome = merge_expert(line, str(options["config_file"]))
    if outcome is None:
        say(f"Nothing can be folded in {line} now: none waits, or `foldin status {line}` says what is in the way.")
    finish([outcome] if outcome else [], as_json)


@cli.command(short_help="Look for anything that is not as it should be.")
@click.option("--rebuild", is_flag=True, help="First put lines that the ledger lost back from what MLflow keeps.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def doctor(options: dict[str, Any], rebuild: bool, as_json: bool) -> None:
    """Look for anything that is not as it should be; exit 1 when there is something."""
    from dataclasses import asdict

    from flows.doctor import examine

    house = house_of(options)
    if rebuild:
        from flows.rebuilding import rebuild as put_back

        if not put_back(house):
            say("The ledger knows every line; nothing was put back.")
    found = examine(house)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        for each in found:
            click.echo(str(each))
    say(f"{len(found)} finding{'s' * (len(found) != 1)}." if found else "Everything is as it should be.")
    sys.exit(1 if found else 0)


@cli.command(short_help="Sign versions that have no good signature.")
@click.argument("line")
@click.pass_obj
def sign(options: dict[str, Any], line: str) -> None:
    """Sign the versions of LINE that have no good signature, each verified first."""
    house = house_of(options)
    from flows.signing import sign_line

    signed = sign_line(house, line)
    click.echo("\n".join(f"{line} v{version}" for version in signed))
    say(f"{len(signed)} version{'s' * (len(signed) != 1)} signed.")


@cli.command(short_help="Show the pages of MLflow and Prefect.")
@click.option("--prefect-port", default=4200, show_default=True)
@click.option("--mlflow-port", default=5000, show_default=True)
@click.pass_obj
def ui(options: dict[str, Any], prefect_port: int, mlflow_port: int) -> None:
    """Show the MLflow and Prefect pages until interrupted."""
    config = prepared(options)
    import threading

    from flows.serve import mlflow_server, prefect_server

    with prefect_server(config, prefect_port), mlflow_server(config, mlflow_port):
        say("Ctrl-C ends both.")
        threading.Event().wait()


PEOPLE = (status, log, show, diff, score, report, approve, reject, rollback, replay, requeue, archive, gc)
for verb in (*PEOPLE, nightly, up, down, receive, webhook):
    cli.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exceptions become exit codes here and nowhere else."""
    from registry.records import FoldinError

    sys.excepthook = show_traceback
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except FoldinError as error:
        if debug:
            raise
        fail(str(error), 1)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except OSError as error:
        if debug:
            raise
        from flows.faults import refused_by_system

        fail(str(refused_by_system(error)), 1)


if __name__ == "__main__":
    main()
