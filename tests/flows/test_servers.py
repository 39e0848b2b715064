"""The whole loop on a real MLflow server, PostgreSQL and S3: the code of every other line, with other URLs."""

import json

import pytest
from sqlalchemy import text

from experiments.plain_client import champion as alias
from experiments.plain_client import register_expert
from flows.config import load
from flows.doctor import examine
from flows.stack import servers
from flows.thinning import rebuilt
from flows.versions import STATE_FOLDER, open_version
from flows.wiring import house
from registry import database, far
from registry.files import hash_tree, sha256_file
from registry.objects import Objects

pytestmark = [
    pytest.mark.integration,
    # The verbs run in this process here; they leave their connections to its end.
    pytest.mark.filterwarnings("ignore:.*psycopg.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*BaseConnection.__del__:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """The settings of a registry with three real servers; weights of a kilobyte are large enough to stay in S3."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "foldin.toml").write_text("")
    with pytest.MonkeyPatch.context() as patch, servers(load(folder / "foldin.toml")) as found:
        patch.setattr(far, "SMALL", 1024)
        far.store.cache_clear()
        yield found
    far.store.cache_clear()


@pytest.fixture
def toml(stack, workshop, prefect, request):
    """A line of its own for each test, in the same registry."""
    path, line = workshop / "foldin.toml", f"s{abs(hash(request.node.name)) % 10**8}"
    urls = "\n".join(f'{key} = "{getattr(stack, key)}"' for key in ("tracking_uri", "artifact_root", "ledger_url"))
    text = path.read_text().replace("[registry]\n", f"[registry]\ncache = 0.0\n{urls}\n").replace("tiny", line)
    path.write_text(text)
    yield path, line
    house(str(path)).ledger.close()
    house.cache_clear()


def folded(toml, line, zoo, *numbers):
    from flows.watch import watch

    at = house(str(toml))
    for number in numbers:
        root, uri = at.config.registry.artifact_root, at.config.registry.tracking_uri
        register_expert(uri, f"{line}-experts", zoo / f"expert-{number}", f"task-{number}", root)
    return watch(line, str(toml))


def stored_here(at, zoo):
    """Weights on this machine, but for the base's, which was given as a folder of it."""
    base = sha256_file(zoo / "base/model.safetensors")
    found = [path for path in at.config.home.rglob("*.safetensors") if "work" not in path.parts]
    return [path for path in found if sha256_file(path) != base]


@pytest.mark.chaos
def test_from_registering_to_replay_without_a_copy_of_any_weights_here(toml, zoo, verbs):
    path, line = toml
    assert [each["state"] for each in folded(path, line, zoo, 1, 2)] == ["folded", "folded"]
    at = house(str(path))
    assert alias(at.config.registry.tracking_uri, line) == 3
    assert examine(at) == []
    assert stored_here(at, zoo) == []
    verb = verbs(path)
    code, out, _ = verb("replay", line, "--without", "task-1", "--promote", "--because", "a test", "--json")
    assert (code, json.loads(out)["promoted"]) == (0, True)
    assert verb("rollback", line, "--to", 3, "--because", "back")[0] == 0
    assert [each["state"] for each in folded(path, line, zoo, 3)] == ["folded"]
    at = house(str(path))
    assert examine(at) == []
    assert stored_here(at, zoo) == []
    assert at.mlflow.folder(line, 3).is_relative_to(at.config.home / "downloads")
    # Archived, the expert may go: what was kept of it lies in S3 too.
    code, out, _ = verb("archive", line, "task-3", "--json")
    assert (code, json.loads(out)[0]["state"]) == (0, "archived")
    at = house(str(path))
    assert stored_here(at, zoo) == []
    at.mlflow._client.delete_model_version(f"{line}-experts", "3")
    code, out, _ = verb("replay", line, "--without", "task-2", "--because", "another", "--json")
    assert (code, [each["source"] for each in json.loads(out)["experts"]]) == (0, ["archive"])
    assert examine(house(str(path))) == []


@pytest.mark.chaos
def test_the_bytes_are_those_of_an_embedded_line(toml, zoo, tmp_path_factory, furnish):
    path, line = toml
    folded(path, line, zoo, 1, 2)
    embedded = furnish(tmp_path_factory.mktemp("embedded")) / "foldin.toml"
    from flows.watch import watch
    from flows.wiring import artifact_root, tracking_uri

    there = open_version(house(str(path)), line, 3, whole=True)
    theirs = {name: digest for name, digest in hash_tree(there.folder).items() if name.endswith(".safetensors")}
    here = house(str(embedded))
    for number in (1, 2):
        root = artifact_root(here.config)
        register_expert(tracking_uri(here.config), "tiny-experts", zoo / f"expert-{number}", f"task-{number}", root)
    watch("tiny", str(embedded))
    version = open_version(here, "tiny", 3)
    ours = {name: digest for name, digest in hash_tree(version.folder).items() if name.endswith(".safetensors")}
    assert ours == theirs
    assert version.memory.weights_sha256 == there.memory.weights_sha256
    here.ledger.close()


@pytest.mark.chaos
def test_old_weights_leave_the_store_and_come_back(toml, zoo, verbs):
    path, line = toml
    folded(path, line, zoo, 1, 2)
    at, store, verb = house(str(path)), Objects(), verbs(path)
    uri = at.mlflow._client.get_model_version_download_uri(line, "2")
    before = hash_tree(open_version(at, line, 2, whole=True).folder)
    code, out, _ = verb("gc", line, "--keep", 0, "--yes", "--json")
    removed = [each["name"] for each in json.loads(out)["items"] if each["kind"] == "weights"]
    assert (code, removed) == (0, [f"{line} v2"])
    assert "model.safetensors" not in store.below(uri)
    at = house(str(path))
    assert examine(at) == []
    assert open_version(at, line, 2).thin
    assert verb("rollback", line, "--to", 2, "--because", "a test")[0] == 0
    at = house(str(path))
    assert "model.safetensors" in store.below(uri)
    version = open_version(at, line, 2, whole=True)
    assert hash_tree(version.folder) == before
    assert len(version.weights()) > 0
    assert examine(at) == []
    assert stored_here(at, zoo) == []


@pytest.mark.chaos
def test_a_state_that_was_exchanged_is_found_though_its_tensors_are_kept_here(toml, zoo, verbs):
    path, line = toml
    path.write_text(path.read_text().replace("cache = 0.0", "cache = 1.0"))
    folded(path, line, zoo, 1, 2)
    at, store = house(str(path)), Objects()
    uri = at.mlflow._client.get_model_version_download_uri(line, "2")
    state = next(name for name in store.below(uri) if name.startswith(STATE_FOLDER) and name.endswith(".safetensors"))
    was = store.head(f"{uri}/{state}")
    content = store.read(was, 0, was.size)
    content[-1] ^= 1
    spoilt = at.config.folder / "spoilt"
    spoilt.write_bytes(content)
    store.upload(spoilt, f"{uri}/{state}")
    with rebuilt(at, line, open_version(at, line, 1), open_version(at, line, 2)):
        pass  # what is kept here gives the weights all the same
    code, out, _ = verbs(path)("gc", line, "--keep", 0, "--yes", "--json")
    left = json.loads(out)["left"]
    assert (code, list(left)) == (0, ["2"])
    assert "E_DIGEST" in left["2"]
    assert "model.safetensors" in store.below(uri)


@pytest.mark.chaos
def test_exchanged_weights_are_found_and_made_again_by_a_rollback(toml, zoo, verbs):
    path, line = toml
    folded(path, line, zoo, 1, 2)
    at, store = house(str(path)), Objects()
    uri = at.mlflow._client.get_model_version_download_uri(line, "2")
    content = bytearray(
        store.read(store.head(f"{uri}/model.safetensors"), 0, store.head(f"{uri}/model.safetensors").size)
    )
    content[-1] ^= 1
    spoilt = at.config.folder / "spoilt"
    spoilt.write_bytes(content)
    store.upload(spoilt, f"{uri}/model.safetensors")
    assert [(each.code, each.file) for each in examine(at)] == [("E_DIGEST", "model.safetensors")]
    code, _, said = verbs(path)("rollback", line, "--to", 2, "--because", "a test")
    assert (code, f"{line} v2: its weights are made again" in said) == (0, True)
    at = house(str(path))
    assert alias(at.config.registry.tracking_uri, line) == 2
    assert examine(at) == []


@pytest.mark.chaos
def test_an_upload_that_nobody_finished_is_found(toml, zoo):
    import boto3

    path, line = toml
    folded(path, line, zoo, 1)
    at = house(str(path))
    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket="foldin", Key="mlflow/left/model.safetensors")
    try:
        assert [(each.code, each.file) for each in examine(at)] == [("E_UPLOAD", "model.safetensors")]
    finally:
        client.abort_multipart_upload(Bucket="foldin", Key=upload["Key"], UploadId=upload["UploadId"])
    assert examine(at) == []


@pytest.mark.chaos
def test_a_lost_ledger_comes_back_on_postgresql(toml, zoo, verbs):
    path, line = toml
    folded(path, line, zoo, 1, 2)
    verb = verbs(path)
    before = verb("--quiet", "log", line, "--json")[1]
    with database.transaction(house(str(path)).ledger._engine) as tx:
        for table in ("events", "merges", "experts", "leases"):
            tx.execute(text(f"DELETE FROM {table} WHERE line = :line"), {"line": line})
        tx.execute(text("DELETE FROM lines WHERE name = :line"), {"line": line})
    assert verb("--quiet", "doctor")[0] == 1
    assert verb("--quiet", "doctor", "--rebuild")[:2] == (0, "")
    assert verb("--quiet", "log", line, "--json")[1] == before
