"""The command line against a real MLflow server, whose artifacts are on its side of HTTP."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlflow
import pytest

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server_folder(tmp_path_factory):
    """Where the server keeps the artifacts; nobody else may look there."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def server(server_folder):
    """The URL of an MLflow server that keeps the artifacts itself."""
    folder = server_folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    lean = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else it starts eight more processes
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(command, cwd=folder, env=lean, stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "the server did not answer"
                time.sleep(0.3)
        yield url
        process.terminate()


def check_damage(server, server_folder, workshop, verb):
    """What counts of the base is what the server stores, not the good copy of it that was brought here."""
    source = mlflow.MlflowClient(server, server).get_model_version("tiny", "1").source
    (stored,) = server_folder.rglob(f"{source.removeprefix('models:/')}/artifacts/model.safetensors")
    brought = workshop / ".foldin/downloads/versions/tiny/1/model.safetensors"
    assert verb("show", "tiny", 1)[0] == 0
    good = stored.read_bytes()
    assert brought.read_bytes() == good
    stored.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "E_DIGEST" in verb("--quiet", "doctor")[1]
    brought.write_bytes(good)
    code, out, said = verb("gc", "tiny", "--keep", 0, "--yes", "--json")
    facts = json.loads(out)
    assert (code, facts["versions"]["3"]["files"], list(facts["left"])) == (0, "whole", ["3", "4"]), said
    assert "nothing gives its weights back: E_DIGEST" in facts["left"]["3"]
    verb("show", "tiny", 1)
    brought.write_bytes(good)
    code, _, said = verb("rollback", "tiny", "--to", 1, "--because", "a test")
    assert (code, "E_DIGEST" in said) == (1, True)
    stored.write_bytes(good)


def check_thinning(workshop, verb):
    """Version 3, which is not the champion now, gives its weights up and has them back, over HTTP, signed as it was."""
    whole, brought = json.loads(verb("gc", "tiny", "--json")[1]), workshop / ".foldin/downloads/versions/tiny/3"
    code, out, said = verb("gc", "tiny", "--keep", 0, "--yes", "--json")
    assert (code, json.loads(out)["left"]) == (0, {}), said
    assert json.loads(out)["versions"]["3"]["files"] == "thin"
    assert verb("doctor")[0] == 0
    assert not (brought / "model.safetensors").exists()
    shutil.copytree(brought, workshop / "aside")
    assert verb("rollback", "tiny", "--to", 3, "--because", "a test")[0] == 0
    assert json.loads(verb("gc", "tiny", "--json")[1])["versions"]["3"] == whole["versions"]["3"]
    shutil.rmtree(brought)
    shutil.move(workshop / "aside", brought)  # another machine brought it while it was thin
    assert verb("doctor")[0] == 0
    assert (brought / "model.safetensors").exists()


@pytest.mark.chaos
def test_the_whole_loop_through_the_command_line(server, server_folder, workshop, zoo, verbs, write_key):
    toml = workshop / "foldin.toml"
    text = toml.read_text().replace("[registry]\n", f'[registry]\ntracking_uri = "{server}"\n')
    toml.write_text(text + '[lines.tiny.signing]\nkey = "own.pem"\nversions = ["own.pub"]\n')
    write_key(workshop / "own.pem")
    verb = verbs(toml)
    assert verb("init", "tiny")[:2] == (0, "")
    for number in (1, 2):
        added = verb("add", zoo / f"expert-{number}", "--line", "tiny", "--task", f"task-{number}")
        assert added[:2] == (0, f"tiny-experts v{number}\n"), added
    code, out, said = verb("watch", "tiny", "--json")
    assert code == 0, said
    assert [(each["state"], each["version"]) for each in json.loads(out)] == [("folded", 2), ("folded", 3)]
    # What is archived comes back from that side too.
    assert verb("archive", "tiny", "task-2")[0] == 0
    mlflow.MlflowClient(server, server).delete_model_version("tiny-experts", "2")
    code, out, said = verb("replay", "tiny", "--without", "task-1", "--because", "a test", "--json")
    assert (code, [each["source"] for each in json.loads(out)["experts"]]) == (0, ["archive"]), said
    assert not any((workshop / ".foldin/downloads/brought").iterdir())
    assert verb("rollback", "tiny", "--because", "a test")[:2] == (0, "tiny: v3 -> v2\n")
    assert [expert["task"] for expert in json.loads(verb("show", "tiny", "--json")[1])["experts"]] == ["task-1"]
    assert verb("doctor")[0] == 0
    check_damage(server, server_folder, workshop, verb)
    check_thinning(workshop, verb)
    mlflow.set_tracking_uri(server)
    mlflow.artifacts.download_artifacts("models:/tiny/3", dst_path=str(workshop / "downloaded"))
    command = [sys.executable, "-m", "model_signing", "verify", "key", "downloaded", "--public_key", "own.pub"]
    subprocess.run([*command, "--signature", "downloaded/model.sig"], cwd=workshop, check=True, timeout=120)
