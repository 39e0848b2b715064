"""What every registry owes foldin, whatever is behind it.

Each test runs on SQLite and files, on a server with PostgreSQL and S3, and on one that hands the files through itself.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
from mlflow import MlflowClient

from flows.config import load
from flows.processes import free_port, started
from flows.stack import mlflow, servers
from registry import far
from registry.files import hash_tree, sha256_file
from registry.manifests import MANIFEST, SIGNATURE, verify_manifest, write_manifest
from registry.mlflow_store import MlflowStore
from registry.records import FoldinError

pytestmark = pytest.mark.integration
NAMES = count(1)


@contextmanager
def proxying(config):
    """(URI, artifact root) of an MLflow server that keeps the files itself and lets nobody else at them."""
    service = mlflow(free_port(), lambda: f"sqlite:///{config.home}/served.db", "")
    keeps = ("--artifacts-destination", str(config.home / "kept"))
    with started(replace(service, command=lambda: [*service.command(), *keeps]), config.home) as server:
        server.await_answer()
        yield service.page.url, ""


@contextmanager
def stacked(config):
    with servers(config) as found:
        yield found.tracking_uri, found.artifact_root


@contextmanager
def embedded(config):
    yield f"sqlite:///{config.home / 'mlflow.db'}", (config.home / "artifacts").as_uri()


@pytest.fixture(scope="module", params=[embedded, stacked, proxying], ids=["embedded", "servers", "proxied"])
def registry(request, tmp_path_factory):
    """The URI and the artifact root of one registry."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "foldin.toml").write_text("")
    config = load(folder / "foldin.toml")
    config.home.mkdir()
    with pytest.MonkeyPatch.context() as patch, request.param(config) as found:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        patch.setattr(far, "SMALL", 1024)  # so that the weights of these tests stay in S3 too
        far.store.cache_clear()
        yield found
    far.store.cache_clear()


@pytest.fixture
def store(registry, tmp_path):
    """A client of it with nothing cached, as on another machine."""
    far.trust(tmp_path)
    return MlflowStore(*registry, tmp_path / "downloads")


@pytest.fixture
def client(registry):
    return MlflowClient(registry[0], registry[0])


@pytest.fixture
def line():
    """A name that nobody has used."""
    return f"line-{next(NAMES)}"


@pytest.fixture
def folder(tmp_path):
    """A finished version's folder: files of two levels, one with an odd but plain name, the manifest last."""
    root = tmp_path / "version"
    (root / "foldin/state").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "odd name (1)@+=.txt").write_text("odd")
    (root / "weights.bin").write_bytes(bytes(range(256)) * 16)
    (root / "foldin/state/part.bin").write_bytes(b"state" * 1000)
    write_manifest(root, {"line": "any"})
    return root


def publish(store, line, folder, key="k1", **tags):
    run = store.runs.run_for(line, key, f"{line} {key}", {})
    said = {"description": "a test", "metrics": {"accuracy": 0.5}, "tags": {"foldin.expert": "e v1", **tags}}
    return store.publish(line, key, run, folder, **said)


def refused(code, call, *arguments):
    with pytest.raises(FoldinError) as caught:
        call(*arguments)
    assert caught.value.refusal.code == code, caught.value
    return caught.value.refusal


# watched models


def test_versions_come_in_the_order_of_their_numbers_over_several_pages(store, client, line):
    client.create_registered_model(line)
    for _ in range(103):
        client.create_model_version(line, "s3://nobody/nothing")
    assert [each.version for each in store.newer(line, 0)] == list(range(1, 104))
    assert [each.version for each in store.newer(line, 101)] == [102, 103]


def test_what_is_not_there_is_nothing_and_no_error(store, line):
    assert list(store.newer(line, 0)) == []
    assert store.expert(line, 1) is None
    assert store.champion(line) is None
    assert store.candidate(line) is None
    assert store.registered(line, "k1") is None
    assert not store.published(line, "k1")


def test_an_experts_tags_status_and_files_are_what_was_registered(store, folder, line):
    assert store.register_expert(line, folder, [], {"foldin.task": "city"}) == 1
    found = store.expert(line, 1)
    assert (found.name, found.tags["foldin.task"]) == (f"{line} v1", "city")
    assert found.status.endswith("READY")
    assert found.created > 1e9
    assert hash_tree(store.fetch(found)) == hash_tree(folder)


def test_an_expert_whose_upload_is_not_finished_says_so(store, client, line):
    client.create_registered_model(line)
    begun = client.create_logged_model(client.create_experiment(f"{line}-team"), name=line)
    client.create_model_version(line, f"models:/{begun.model_id}", model_id=begun.model_id)
    assert "PENDING" in store.expert(line, 1).status
    client.finalize_logged_model(begun.model_id, "FAILED")
    assert "FAILED" in store.expert(line, 1).status


def test_a_deleted_expert_is_gone_and_its_number_is_not_used_again(store, client, folder, line):
    for _ in range(2):
        store.register_expert(line, folder, [], {})
    client.delete_model_version(line, "1")
    assert store.expert(line, 1) is None
    assert [each.version for each in store.newer(line, 0)] == [2]
    assert store.register_expert(line, folder, [], {}) == 3


def test_an_expert_without_files_is_named(store, client, line):
    client.create_registered_model(line)
    begun = client.create_logged_model(client.create_experiment(f"{line}-team"), name=line)
    client.finalize_logged_model(begun.model_id, "READY")
    client.create_model_version(line, f"models:/{begun.model_id}", model_id=begun.model_id)
    found = store.expert(line, 1)
    assert not store.files.there(line, 1)
    assert refused("E_SOURCE", store.fetch, found).where == f"{line} v1"


# a line's versions


def test_what_is_published_is_stored_whole_and_found_again(store, client, folder, line, registry, tmp_path):
    assert publish(store, line, folder) == 1
    assert publish(store, line, folder) == 1  # again
    assert publish(store, line, folder, "k2") == 2
    assert store.versions(line) == [1, 2]
    assert (store.registered(line, "k1"), store.registered(line, "k2")) == (1, 2)
    assert store.published(line, "k1")
    elsewhere = MlflowStore(*registry, tmp_path / "another machine")
    stored = elsewhere.folder(line, 1)
    elsewhere.files.look_again(stored)
    assert verify_manifest(stored) == []
    assert hash_tree(stored) == hash_tree(folder)
    seen = client.get_model_version(line, "1")
    assert (seen.description, seen.tags["foldin.expert"]) == ("a test", "e v1")
    (measured,) = client.get_logged_model(store.model_id(line, 1)).metrics
    assert (measured.key, measured.value) == ("accuracy", 0.5)


@pytest.mark.parametrize("step", ["finalize_logged_model", "create_model_version"])
def test_a_publication_that_was_cut_off_is_finished_by_the_next(
    store, folder, line, monkeypatch, step, registry, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, lambda *arguments, **keywords: (_ for _ in ()).throw(OSError("cut off")))
        assert refused("E_MLFLOW", publish, store, line, folder).found == "cut off"
    assert store.published(line, "k1") is (step == "create_model_version")
    assert store.versions(line) == []
    assert publish(MlflowStore(*registry, tmp_path / "next"), line, folder) == 1
    assert store.versions(line) == [1]
    assert hash_tree(store.folder(line, 1)) == hash_tree(folder)


def test_one_merge_published_by_several_at_once_is_one_for_all_readers(store, folder, line):
    """The lease forbids it, but a holder that was overtaken may still be at it."""

    def attempt(_):
        try:
            return publish(store, line, folder)
        except FoldinError as error:
            return error.refusal.code

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(attempt, range(3))) <= {1, 2, 3, "E_MLFLOW"}
    assert publish(store, line, folder) == store.registered(line, "k1") == 1
    assert hash_tree(store.folder(line, 1)) == hash_tree(folder)


def test_a_file_that_did_not_arrive_whole_is_no_version(store, folder, line, monkeypatch):
    send = type(store.files)._send

    def damaged(files, model, path, name):
        if name == "weights.bin":
            path = path.rename(path.with_name("whole"))
            (path.parent / name).write_bytes(path.read_bytes()[:-1] + b"?")
            send(files, model, path.parent / name, name)
            path.replace(path.parent / name)
        else:
            send(files, model, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(type(store.files), "_send", damaged)
        assert refused("E_MLFLOW", publish, store, line, folder).file == "weights.bin"
    assert store.versions(line) == []
    assert publish(store, line, folder) == 1
    assert hash_tree(store.folder(line, 1)) == hash_tree(folder)


def test_aliases_stand_where_they_were_put(store, client, folder, line):
    for key in ("k1", "k2"):
        publish(store, line, folder, key)
    store.point_champion(line, 1)
    store.point_champion(line, 2)
    store.point_candidate(line, 1)
    assert (store.champion(line), store.candidate(line)) == (2, 1)
    client.set_registered_model_alias(line, "blue", "1")
    assert store.aliased(line) == {1, 2}
    store.point_candidate(line, None)
    store.point_candidate(line, None)
    assert store.candidate(line) is None
    assert int(client.get_model_version_by_alias(line, "champion").version) == 2


def test_a_label_is_replaced_and_the_others_stay(store, client, folder, line):
    publish(store, line, folder)
    store.label(line, 1, {"foldin.state": "one"})
    store.label(line, 1, {"foldin.state": "two", "long": "x" * 5_000})
    tags = client.get_model_version(line, "1").tags
    assert (tags["foldin.state"], tags["foldin.expert"]) == ("two", "e v1")
    assert tags["long"] == "x" * 400


def test_a_retired_version_has_no_files_and_stays_registered(store, folder, line):
    for key in ("k1", "k2"):
        publish(store, line, folder, key)
    listed = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert store.files.sizes(line, 1) == store.files.sizes(line, 2) == listed
    store.folder(line, 1)
    for _ in range(2):  # again, as after a kill
        store.retire(line, 1)
    assert not store.files.there(line, 1)
    assert store.files.sizes(line, 1) == {}
    assert store.expert(line, 1).tags["foldin.state"] == "retired"
    assert store.versions(line) == [1, 2]
    assert hash_tree(store.folder(line, 2)) == hash_tree(folder)


def test_single_files_of_a_version_go_and_come_back(store, folder, line, registry, tmp_path):
    publish(store, line, folder)
    whole, names = hash_tree(folder), ["weights.bin", "foldin/state/part.bin"]
    for _ in range(2):  # again, as after a kill
        store.files.drop(line, 1, names)
    assert hash_tree(store.folder(line, 1)).keys() == whole.keys() - set(names)
    for _ in range(2):
        store.files.put(line, 1, folder, names)
    assert hash_tree(store.folder(line, 1)) == whole
    assert hash_tree(MlflowStore(*registry, tmp_path / "another machine").folder(line, 1)) == whole


def test_single_files_are_read_as_they_are_now(store, folder, line, tmp_path):
    publish(store, line, folder)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert store.signature(line, 1, fresh) is None
    assert store.files.single(line, 1, "foldin/nothing", fresh) is None
    path = store.files.single(line, 1, "foldin/state/part.bin", fresh)
    assert path.read_bytes() == b"state" * 1000
    for text in ("first", "second"):
        (tmp_path / SIGNATURE).write_text(text)
        store.attach(line, 1, tmp_path / SIGNATURE)
        again = tmp_path / text
        again.mkdir()
        assert store.signature(line, 1, again).read_text() == text


def test_the_manifest_is_the_last_file_to_arrive(store, folder, line, monkeypatch):
    send, sent = type(store.files)._send, []
    monkeypatch.setattr(type(store.files), "_send", lambda *them: (sent.append(them[3]), send(*them)))
    publish(store, line, folder)
    assert sorted(sent) == sorted(hash_tree(folder))
    assert sent[-1] == MANIFEST


# runs and histories


def test_a_run_is_made_once_and_shows_what_it_is_given(store, client, folder, line, tmp_path):
    run = store.runs.run_for(line, "k1", "a fold", {"foldin.expert": "e v1"})
    assert store.runs.run_for(line, "k1", "a fold", {}) == run
    artifacts = [(folder / "config.json", "foldin")]
    facts = {"params": {"method": "opcm"}, "metrics": {"mean": 0.25}, "tags": {"foldin.verdict": "passed"}}
    store.register_expert(f"{line}-experts", folder, [], {})
    inputs = [store.model_id(f"{line}-experts", 1), ""]
    for _ in range(2):  # again, as after a kill
        store.runs.show(run, artifacts=artifacts, inputs=inputs, **facts)
    seen = client.get_run(run)
    assert (seen.info.status, seen.data.params["method"], seen.data.metrics["mean"]) == ("FINISHED", "opcm", 0.25)
    assert {each.model_id for each in seen.inputs.model_inputs} == {inputs[0]}
    assert store.runs.artifact(run, "foldin/config.json", tmp_path).read_text() == "{}"
    for value in (1.0, float("nan")):
        store.runs.show_child(run, "try 1", params={}, metrics={"tune.new": value}, tags={})
    query = f"tags.`mlflow.parentRunId` = '{run}'"
    (child,) = client.search_runs([seen.info.experiment_id], query)
    assert child.data.metrics == {"tune.new": 1.0}


def test_the_history_kept_last_is_the_one_that_counts(store, client, line):
    assert store.runs.history_sha256(line) == ""
    assert refused("E_HISTORY", store.runs.history, line).where.endswith(f"{line} in MLflow")
    for content in (b"one", b"two", b"two"):
        store.runs.keep_history(line, content)
    assert store.runs.history(line) == b"two"
    run = store.runs.history_run(line).info.run_id
    assert len(client.list_artifacts(run)) == 1
    client.set_tag(run, "foldin.history", client.list_artifacts(run)[0].path + " " + "0" * 64)
    assert refused("E_HISTORY", store.runs.history, line).expected == "0" * 12


def test_an_archive_is_kept_whole_beside_the_history(store, client, folder, line, registry, tmp_path):
    manifest = sha256_file(folder / MANIFEST)
    for _ in range(2):  # again, as after a kill
        store.archives.keep(line, folder, manifest)
    store.runs.keep_history(line, b"one")  # what is kept of the history does not sweep archives away
    elsewhere = MlflowStore(*registry, tmp_path / "another machine")
    with elsewhere.archives.opened(line, manifest) as found:
        assert hash_tree(found) == hash_tree(folder)
    with pytest.raises(FoldinError, match="E_SOURCE"), elsewhere.archives.opened(line, "0" * 64):
        pass
    assert elsewhere.runs.history(line) == b"one"


def test_nobody_there_is_a_typed_error_without_a_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = MlflowStore("http://me:secret@127.0.0.1:9", "", tmp_path)
    found = refused("E_MLFLOW", store.champion, "any")
    assert "secret" not in str(found)
    assert found.where == "MLflow at http://***@127.0.0.1:9"
