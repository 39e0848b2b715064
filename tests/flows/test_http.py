"""The command line against a real MLflow server, whose artifacts are on its side of HTTP."""

import json
import os
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
def server(tmp_path_factory):
    """The URL of an MLflow server that keeps the artifacts itself."""
    folder = tmp_path_factory.mktemp("mlflow")
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


def test_the_whole_loop_through_the_command_line(server, workshop, zoo, verbs, write_key):
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
    mlflow.set_tracking_uri(server)
    mlflow.artifacts.download_artifacts("models:/tiny/3", dst_path=str(workshop / "downloaded"))
    command = [sys.executable, "-m", "model_signing", "verify", "key", "downloaded", "--public_key", "own.pub"]
    subprocess.run([*command, "--signature", "downloaded/model.sig"], cwd=workshop, check=True, timeout=120)
