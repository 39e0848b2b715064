"""foldin gc: what goes, what never goes, and that nothing breaks when it is gone."""

import json
import os
import signal

import pytest

from experiments.plain_client import register_expert
from flows.collecting import Keep, collectable, needed, stored_of
from flows.doctor import examine
from flows.memory import STATE_FILE
from flows.versions import open_version
from flows.wiring import artifact_root, house, tracking_uri
from registry.records import FoldinError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def toml(tmp_path_factory, furnish, prefect, zoo):
    """Four experts folded into versions 2 to 5."""
    from flows.watch import watch

    path = furnish(tmp_path_factory.mktemp("collected")) / "foldin.toml"
    at = house(str(path))
    for number in (1, 2, 3, 4):
        uri, root = tracking_uri(at.config), artifact_root(at.config)
        register_expert(uri, "tiny-experts", zoo / f"expert-{number}", f"task-{number}", root)
    watch("tiny", str(path))
    yield path
    house(str(path)).ledger.close()
    house.cache_clear()


def test_old_versions_lose_their_files_and_nothing_that_is_needed_does(toml, verbs, zoo):
    verb = verbs(toml)
    at = house(str(toml))
    assert collectable(at, "tiny", Keep(5, 5), stored_of(at, "tiny")) == []
    assert needed(at, "tiny", 1) == {1, 4, 5}
    assert needed(at, "tiny", 0) == {1, 5}
    weights = open_version(at, "tiny", 5).memory.weights_sha256
    code, out, _ = verb("gc", "tiny", "--keep", 1, "--keep-thin", 1, "--json")
    facts = json.loads(out)
    assert code == 0
    assert [each["name"] for each in facts["items"] if each["kind"] == "version"] == ["tiny v2", "tiny v3"]
    versions = [each for each in facts["items"] if each["kind"] == "version"]
    assert all(each["size"] == facts["versions"][each["name"][-1]]["bytes"] > 100_000 for each in versions)
    at = house(str(toml))
    assert open_version(at, "tiny", 2)  # a look removes nothing
    assert "would go" in verb("gc", "tiny", "--keep", 1, "--keep-thin", 1)[1]
    assert verb("gc", "tiny", "--keep", 1, "--keep-thin", 1, "--yes", "--because", "room")[0] == 0
    at = house(str(toml))
    for version in (2, 3):
        with pytest.raises(FoldinError, match=f"E_RETIRED tiny v{version}: the version was retired"):
            open_version(at, "tiny", version)
        assert not at.mlflow.files.there("tiny", version)
        assert at.mlflow.expert("tiny", version).tags["foldin.state"] == "retired"
    assert open_version(at, "tiny", 5).memory.weights_sha256 == weights
    assert examine(at) == []
    assert collectable(at, "tiny", Keep(1, 1), stored_of(at, "tiny")) == []
    assert verb("gc", "tiny", "--keep", 1, "--keep-thin", 1, "--yes")[0] == 0  # again
    code, _, said = verb("rollback", "tiny", "--to", 2, "--because", "x")
    assert (code, "E_RETIRED tiny v2" in said) == (1, True)
    assert "v2  + task-1  (tiny-experts v1), retired" in verb("log", "tiny")[1]


@pytest.mark.chaos
def test_copies_stay_while_a_version_does_not_say_which_it_holds(toml, forge):
    at = house(str(toml))
    unheld = at.experts / "ab" / ("ab" * 32)
    unheld.mkdir(parents=True)
    os.utime(unheld, (0, 0))

    def listed():
        return [each.name for each in collectable(at, "tiny", Keep(5, 5), stored_of(at, "tiny")) if each.kind == "copy"]

    assert listed() == [str(unheld)]
    memory = at.mlflow.folder("tiny", 5) / STATE_FILE
    content = memory.read_bytes()
    for damage in (memory.unlink, lambda: memory.write_text("{")):
        damage()
        assert listed() == []
    memory.write_bytes(content)
    point = ("registry.mlflow_files", "Files.single", "after", 1)
    assert forge.life(toml.parent, signal.SIGKILL, point, ("gc", "tiny"))[1] == -signal.SIGKILL
    (left,) = (at.config.home / "downloads/brought").glob(".*.tmp")
    assert list(at.config.home.glob("tmp*")) == []
    os.utime(left, (0, 0))
    assert listed() == [str(unheld)]
    assert not left.exists()
    unheld.rmdir()


@pytest.mark.chaos
def test_a_line_with_retired_versions_goes_on_replays_and_is_rebuilt(toml, verbs, zoo):
    verb = verbs(toml)
    at = house(str(toml))
    uri, root = tracking_uri(at.config), artifact_root(at.config)
    # Without the second expert: version 2 would be the beginning, but is retired, so it is folded from the base.
    code, out, _ = verb("replay", "tiny", "--without", "task-2", "--because", "a test", "--json")
    facts = json.loads(out)
    assert (code, facts["start"]) == (0, 1)
    assert [each["expert"] for each in facts["experts"]] == [f"tiny-experts v{number}" for number in (1, 3, 4)]
    register_expert(uri, "tiny-experts", zoo / "expert-5", "task-5", root)
    assert verb("watch", "tiny")[0] == 0
    before = verb("--quiet", "log", "tiny", "--json")[1]
    house(str(toml)).ledger.close()
    for path in (toml.parent / ".foldin").glob("ledger.db*"):
        path.unlink()
    assert verb("--quiet", "doctor", "--rebuild")[:2] == (0, "")
    assert verb("--quiet", "log", "tiny", "--json")[1] == before
