"""The whole loop on a real model, from one command: what a team would do in a month, in a few minutes, offline."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.comparing import compare
from flows.config import Config, load
from flows.environment import prepare_environment
from flows.serve import temporary_prefect
from flows.setup import write_line
from flows.telling import bar, say, speak
from flows.wiring import House, artifact_root, house, tracking_uri
from registry.records import Decision, FoldinError, Refusal

if TYPE_CHECKING:
    from experiments.texts import TextTask

HEADING = "# The demonstration line.\n"
EMBEDDED = "# Everything below is embedded: SQLite and local folders.\n"
SETTINGS = """approval = "always"  # what passes waits for a person
guards = {{ retrieval = "{guard}" }}  # general ability, which no expert trains for: held to the same limits as a task

[lines.demo.search]
when = "always"  # also when an expert passes: another strength may be better
strengths = [1.3, 1.6, 0.7]
"""
NAMED = ("tracking_uri", "artifact_root", "ledger_url")
LINE = "demo"
EXPERTS = "demo-experts"
BAD, BROKEN = "line", "script"  # tasks of the expert trained on shuffled labels, and of the one with a NaN


class Story:
    """The facts of one run, told as they happen."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.facts: dict[str, Any] = {}
        self._started = time.monotonic()

    def chapter(self, title: str) -> None:
        """Announce the next part."""
        say(f"\n[{time.monotonic() - self._started:5.0f} s] {title}")

    def note(self, **facts: Any) -> None:  # noqa: ANN401 - any JSON
        """Keep facts for the JSON file."""
        self.facts.update(facts)

    def end(self) -> None:
        """Keep how long it took."""
        self.facts["seconds"] = round(time.monotonic() - self._started, 1)


def run(home: Path, base: Path | None, json_file: Path | None, *, backend: str, debug: bool) -> None:
    """The demonstration from nothing: earlier runs in `home` are removed, fine-tuned experts are kept.

    Args:
        home: folder of the demonstration.
        base: folder of all-MiniLM-L6-v2; None for the one in the Python package.
        json_file: where to write the facts of the run; None for nowhere.
        backend: "embedded", or "servers" for MLflow on PostgreSQL with its files in S3, started for the run.
        debug: show Prefect's log.
    """
    story = Story()
    config_file = _fresh(home)
    speak(True)
    prepare_environment(load(config_file, new=True), verbose=debug)
    with _registry(config_file, backend) as registry:
        config_file.write_text(HEADING + registry, encoding="utf-8")
        _tell(config_file, base, story)
        _close(config_file, json_file, story, ended=backend == "servers")


@contextmanager
def _registry(config_file: Path, backend: str) -> Iterator[str]:
    """The table of foldin.toml that says where things are kept."""
    if backend == "embedded":
        yield EMBEDDED
        return
    from flows.stack import servers

    with servers(load(config_file)) as found:
        yield "\n".join(["[registry]", *(f'{key} = "{getattr(found, key)}"' for key in NAMED), ""])


def _tell(config_file: Path, base: Path | None, story: Story) -> None:
    """The whole story, in the registry that the file names."""
    from experiments.zoo import base_folder

    folder = base_folder(base)
    trained: dict[str, tuple[TextTask, Path]] = {}
    with temporary_prefect(load(config_file), lambda: trained.update(_prepare(config_file, folder, story))):
        _live(config_file, folder, trained, story)


def _prepare(config_file: Path, base: Path, story: Story) -> "Mapping[str, tuple[TextTask, Path]]":
    """What comes before the first flow run: task -> expert, and a line."""
    from experiments.guards import write_guard

    story.chapter("Fine-tuning five experts from one base (kept for the next run)")
    trained = _train(base, config_file.parent.parent / "cache")
    story.chapter("Starting the line: the base becomes version 1")
    write_line(config_file, LINE, base, [EXPERTS], None)
    settings = SETTINGS.format(guard=write_guard(config_file.parent / "retrieval"))
    config_file.write_text(config_file.read_text(encoding="utf-8") + settings, encoding="utf-8")
    _start(config_file, load(config_file))
    return trained


def _live(config_file: Path, base: Path, trained: "Mapping[str, tuple[TextTask, Path]]", story: Story) -> None:
    """What the line goes through: five experts, two bad ones, back and forth, and the comparison at the end."""
    config = load(config_file)
    story.chapter("Each expert is registered with a plain MLflow client, folded by the watch flow, and approved")
    _fold_all(config_file, config, trained, story)
    story.chapter("An expert trained on shuffled labels, and one with a NaN")
    _refuse_bad(config_file, config, base, trained, story)
    story.chapter("A person moves the alias two versions back in MLflow; foldin adopts it, then rolls forward")
    _back_and_forth(config_file, config, story)
    story.chapter("What it was worth")
    story.note(**compare(house(str(config_file)), LINE, {name: folder for name, (_, folder) in trained.items()}))


def _fresh(home: Path) -> Path:
    """The configuration file of a new run."""
    config_file = home / "run/foldin.toml"
    ours = config_file.exists() and config_file.read_text(encoding="utf-8").startswith(HEADING)
    if (home / "run").exists() and not ours:
        what, remedy = "the folder is not an earlier demonstration's", "choose another folder with --home"
        raise FoldinError(Refusal("E_CONFIG", what, str(home / "run"), remedy=remedy))
    shutil.rmtree(home / "run", ignore_errors=True)
    (home / "run").mkdir(parents=True)
    config_file.write_text(HEADING, encoding="utf-8")
    return config_file


def _train(base: Path, cache: Path) -> "dict[str, tuple[TextTask, Path]]":
    from experiments.texts import text_task
    from experiments.zoo import DEMONSTRATION, expert

    trained = {}
    for name, recipe in DEMONSTRATION.items():
        task, before = text_task(name), time.monotonic()
        with bar(f"fine-tuning {name}") as progress:
            folder = expert(task, cache, base, recipe, progress)
        trained[name] = (task, folder)
        say(f"  {name:<10} {len(task.labels):>2} labels  {time.monotonic() - before:5.1f} s")
    return trained


def _start(config_file: Path, config: Config) -> None:
    from flows.starting import start

    at = house(str(config_file))
    start(at, LINE, config.line(LINE))


def _fold_all(config_file: Path, config: Config, trained: "Mapping[str, tuple[TextTask, Path]]", story: Story) -> None:
    from experiments.plain_client import register_expert
    from flows.approval import decide

    at, uri = house(str(config_file)), tracking_uri(config)
    outcomes = []
    for name, (_, folder) in trained.items():
        register_expert(uri, EXPERTS, folder, name, artifact_root(config))
        for waits in _watch(config_file):
            why = f"{name} is wanted"
            outcomes.append(decide(at, LINE, waits["version"], Decision.APPROVED, why, "the demonstration"))
    story.note(folded=[each for each in outcomes if each["state"] == "approved"], outcomes=outcomes)


def _refuse_bad(
    config_file: Path, config: Config, base: Path, trained: "Mapping[str, tuple[TextTask, Path]]", story: Story
) -> None:
    from experiments.plain_client import champion, register_expert
    from experiments.zoo import DEMONSTRATION, expert, poison

    uri, home = tracking_uri(config), config_file.parent.parent
    before = champion(uri, LINE)
    recipe = DEMONSTRATION[BAD]._replace(shuffled=True, steps=20)  # enough to ruin it
    with bar("fine-tuning on shuffled labels") as progress:
        bad = expert(trained[BAD][0], home / "cache", base, recipe, progress)
    register_expert(uri, EXPERTS, bad, BAD, artifact_root(config))
    rejected = _watch(config_file)
    after_bad = champion(uri, LINE)
    register_expert(uri, EXPERTS, poison(trained[BROKEN][1], home / "run/broken"), BROKEN, artifact_root(config))
    quarantined = _watch(config_file)
    story.note(
        rejected=rejected,
        rungs=_rungs(house(str(config_file))),
        quarantined=quarantined,
        champion_before=before,
        champion_after_rejected=after_bad,
        champion_after_quarantined=champion(uri, LINE),
    )


def _rungs(at: House) -> dict[str, bool]:
    """Which rungs of the gate the last candidate was asked, and which of them it passed."""
    checks = at.ledger.merges(LINE)[-1].verdict.checks
    return {rung: all(each.passed for each in checks if each.rung == rung) for rung in {each.rung for each in checks}}


def _back_and_forth(config_file: Path, config: Config, story: Story) -> None:
    from experiments.plain_client import champion, move_alias
    from flows.rollback import rollback

    at, uri = house(str(config_file)), tracking_uri(config)
    newest = champion(uri, LINE)
    move_alias(uri, LINE, newest - 2)
    _watch(config_file)
    adopted = at.ledger.line(LINE).champion
    rollback(LINE, "the rollback was a drill", newest, "the demonstration", str(config_file))
    story.note(
        rollback={"from": newest, "moved_to": newest - 2, "adopted": adopted, "forward_to": champion(uri, LINE)},
        champion=champion(uri, LINE),
    )


def _close(config_file: Path, json_file: Path | None, story: Story, *, ended: bool) -> None:
    from flows.printing import console, lineage_tree
    from flows.reading import log, show

    at = house(str(config_file))
    console().print(lineage_tree(log(at, LINE)))
    facts = show(at, LINE, None)
    command = f"{os.path.relpath(Path(sys.executable).with_name('foldin'))} --config {os.path.relpath(config_file)}"
    story.note(report=facts["report"], log=log(at, LINE), config=str(config_file))
    story.end()
    if json_file:
        json_file.write_text(json.dumps(story.facts, indent=1, default=str) + "\n", encoding="utf-8")
    say(f"\nDone in {story.facts['seconds']:.0f} s.")
    say(f"The champion's report:    {facts['report']}")
    if ended:
        say("The servers end now, and the store's content with them.")
        return
    say(f"Both user interfaces:     {command} ui")
    say(f"The line's history:       {command} log {LINE}")


def _watch(config_file: Path) -> list[dict[str, Any]]:
    from flows.watch import watch

    return watch(LINE, str(config_file))
