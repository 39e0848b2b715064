"""A line that asks for signatures: on what comes in, on what goes out, and before anything becomes champion."""

import json
import shutil
import subprocess
import sys

import mlflow
import pytest
from safetensors.torch import load_file, save_file

from experiments.plain_client import champion, move_alias, register_expert
from flows.doctor import examine
from flows.signing import sign_line
from flows.wiring import artifact_root, house, tracking_uri
from registry.files import read_json, sha256_file, write_json
from registry.manifests import MANIFEST, SIGNATURE
from registry.mlflow_store import MlflowStore
from registry.records import FoldinError, Refusal

pytestmark = pytest.mark.integration


def model_signing(verb, folder, *options):
    """The library's own command line, as a team or a user runs it."""
    command = [sys.executable, "-m", "model_signing", verb, "key", folder, "--signature", folder / SIGNATURE]
    return subprocess.run(list(map(str, [*command, *options])), capture_output=True, text=True, timeout=120)


class Signed:
    """The line `tiny` with a table `signing`, and the keys `team`, `foldin` and `other` in its folder."""

    def __init__(self, folder, write_key):
        self.folder, self.toml = folder, folder / "foldin.toml"
        self.plain = self.toml.read_text()
        for name in ("team", "foldin", "other"):
            write_key(folder / f"{name}.pem")

    def ask(self, **signing):
        """Other settings of the table; no settings, no table."""
        rows = "".join(f"{key} = {json.dumps(value)}\n" for key, value in signing.items())
        self.toml.write_text(f"{self.plain}\n[lines.tiny.signing]\n{rows}" if signing else self.plain)
        house.cache_clear()
        return self

    @property
    def at(self):
        return house(str(self.toml))

    def sign(self, folder, key="team"):
        done = model_signing("sign", folder, "--private_key", self.folder / f"{key}.pem")
        assert done.returncode == 0, done.stderr
        return folder

    def register(self, folder, task):
        config = self.at.config
        return register_expert(tracking_uri(config), "tiny-experts", folder, task, artifact_root(config))

    def watch(self):
        from flows.watch import watch

        return [(each["state"], each["version"], each["reason"]) for each in watch("tiny", str(self.toml))]

    def rollback(self, to):
        from flows.rollback import rollback

        return rollback("tiny", "a test", to, "ann", str(self.toml))

    def stored(self, version):
        """The folder in which MLflow keeps a version."""
        return self.at.mlflow.folder("tiny", version)

    def findings(self):
        return [(each.code, each.where, each.file) for each in examine(self.at)]

    @property
    def champion(self):
        seen = champion(tracking_uri(self.at.config), "tiny")
        assert seen == self.at.ledger.line("tiny").champion
        return seen


@pytest.fixture
def signed(workshop, prefect, write_key):
    return Signed(workshop, write_key)


OWN = {"key": "foldin.pem", "versions": ["foldin.pub"]}


@pytest.fixture
def folded(signed, zoo):
    """A line that signs, with the base and two folds."""
    signed.ask(**OWN)
    for number in (1, 2):
        signed.register(zoo / f"expert-{number}", f"task-{number}")
    assert [version for _, version, _ in signed.watch()] == [2, 3]
    return signed


def test_only_experts_that_the_team_signed_are_folded(signed, zoo, tmp_path, write_key):
    signed.ask(experts=["other.pub", "team.pub"])
    strange = shutil.copytree(zoo / "expert-2", tmp_path / "strange")
    write_key(tmp_path / "stranger.pem")
    model_signing("sign", strange, "--private_key", tmp_path / "stranger.pem")
    changed = signed.sign(shutil.copytree(zoo / "expert-3", tmp_path / "changed"))
    weights = load_file(changed / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")  # which nobody gets to see
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    added = signed.sign(shutil.copytree(zoo / "expert-4", tmp_path / "added"))
    (added / "README.md").write_text("a card that came later")
    good = shutil.copytree(zoo / "expert-5", tmp_path / "good")
    (good / "training_args.bin").write_bytes(b"signed, and never copied")
    signed.sign(good)
    for number, folder in enumerate((zoo / "expert-1", strange, changed, added, good), 1):
        signed.register(folder, f"task-{number}")
    outcomes = signed.watch()
    assert [state for state, _, _ in outcomes] == [*["quarantined"] * 4, "folded"]
    assert [expert.code for expert in signed.at.ledger.experts("tiny")] == [*["E_SIGNATURE"] * 4, ""]
    reasons = [reason for _, _, reason in outcomes]
    assert "expert tiny-experts v1: the line asks for a signature and there is none" in reasons[0]
    assert "beside the weights, by one of other.pub, team.pub" in reasons[0]
    assert "file model.sig: the signature was not made with an accepted key" in reasons[1]
    assert "file model.safetensors: the file was changed after it was signed" in reasons[2]
    assert "file README.md: the signature does not cover the file" in reasons[3]
    assert signed.champion == 2
    assert not (signed.stored(2) / SIGNATURE).exists()  # the line does not sign; an expert's signature is no version's


def test_every_version_carries_a_signature_that_the_library_accepts(folded, tmp_path):
    first = [(folded.stored(number) / SIGNATURE).read_bytes() for number in (1, 2, 3)]
    assert len(set(first)) == 3
    mlflow.set_tracking_uri(tracking_uri(folded.at.config))
    folder = tmp_path / "downloaded"
    mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(folder))
    accepted = model_signing("verify", folder, "--public_key", folded.folder / "foldin.pub")
    assert accepted.returncode == 0, accepted.stderr
    assert model_signing("verify", folder, "--public_key", folded.folder / "other.pub").returncode == 1
    state = folder / "foldin/state.json"
    state.write_bytes(state.read_bytes().replace(b"task-1", b"task-9"))
    assert "foldin/state.json" in model_signing("verify", folder, "--public_key", folded.folder / "foldin.pub").stderr
    assert folded.findings() == []
    assert folded.watch() == []
    assert sign_line(folded.at, "tiny") == []
    assert [(folded.stored(number) / SIGNATURE).read_bytes() for number in (1, 2, 3)] == first


@pytest.mark.chaos
def test_a_version_whose_every_record_was_changed_is_found_by_its_signature(folded):
    """Who can write to the artifacts and to both databases, but has no key."""
    folder = folded.stored(2)
    (path,) = folder.glob("*.safetensors")
    weights = bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.write_bytes(weights)
    manifest = read_json(folder / MANIFEST)
    manifest["files"][path.name] = sha256_file(path)
    write_json(folder / MANIFEST, manifest)
    with folded.at.ledger._engine.begin() as tx:
        changed = {"sha": sha256_file(folder / MANIFEST)}
        tx.exec_driver_sql("UPDATE merges SET manifest_sha256 = :sha WHERE version = 2", changed)
    assert ("E_SIGNATURE", "tiny v2", path.name) in folded.findings()
    with pytest.raises(FoldinError, match=r"E_SIGNATURE tiny v2.*changed after it was signed"):
        folded.rollback(2)
    assert folded.champion == 3


@pytest.mark.chaos
def test_a_signature_that_is_lost_or_another_version_s_keeps_a_version_from_being_champion(folded):
    shutil.copyfile(folded.stored(3) / SIGNATURE, folded.stored(2) / SIGNATURE)
    (folded.stored(1) / SIGNATURE).unlink()
    assert [finding[:2] for finding in folded.findings()] == [("E_SIGNATURE", "tiny v1"), ("E_SIGNATURE", "tiny v2")]
    for version in (1, 2):
        with pytest.raises(FoldinError, match=f"E_SIGNATURE tiny v{version}"):
            folded.rollback(version)
        assert folded.champion == 3
    move_alias(tracking_uri(folded.at.config), "tiny", 2)
    assert folded.watch() == []
    assert "version 2, which may not be champion: E_SIGNATURE" in folded.at.ledger.line("tiny").blocked
    assert sign_line(folded.at, "tiny") == [1, 2]
    assert folded.watch() == []  # the person's move is adopted now
    assert folded.champion == 2
    assert folded.findings() == []


def test_a_run_that_dies_before_it_signs_promotes_nothing_and_the_next_one_goes_on(signed, zoo, monkeypatch):
    signed.ask(**OWN).watch()
    signed.register(zoo / "expert-1", "task-1")

    def die(*arguments):
        raise FoldinError(Refusal("E_MLFLOW", "gone"))

    with monkeypatch.context() as dead:
        dead.setattr(MlflowStore, "attach", die)
        with pytest.raises(FoldinError, match="E_MLFLOW line tiny: gone"):
            signed.watch()
    assert signed.at.mlflow.versions("tiny") == [1, 2]
    assert not (signed.stored(2) / SIGNATURE).exists()
    assert signed.champion == 1
    assert [outcome[:2] for outcome in signed.watch()] == [("folded", 2)]
    assert (signed.stored(2) / SIGNATURE).exists()
    assert signed.champion == 2


@pytest.mark.chaos
def test_where_no_key_is_a_version_waits_until_it_was_signed_elsewhere(signed, zoo):
    signed.watch()
    signed.ask(versions=["team.pub"])
    signed.register(zoo / "expert-1", "task-1")
    for _ in range(2):
        with pytest.raises(FoldinError, match=r"E_SIGNATURE tiny v2, file model\.sig: the version has no signature"):
            signed.watch()
    assert (signed.champion, signed.at.ledger.experts("tiny")[0].attempts) == (1, 0)
    with pytest.raises(FoldinError, match=r"E_CONFIG .*no key to sign with"):
        sign_line(signed.at, "tiny")
    signed.sign(signed.stored(2))
    assert [outcome[:2] for outcome in signed.watch()] == [("folded", 2)]


@pytest.mark.chaos
def test_a_line_may_begin_to_sign_and_change_its_key(signed, zoo, verbs):
    signed.register(zoo / "expert-1", "task-1")
    assert signed.watch()[0][:2] == ("folded", 2)
    signed.ask(**OWN)
    assert {finding[0] for finding in signed.findings()} == {"E_SIGNATURE"}
    verb = verbs(signed.toml)
    assert verb("sign", "tiny")[:2] == (0, "tiny v1\ntiny v2\n")
    signed.ask(key="other.pem", versions=["other.pub", "foldin.pub"])
    assert signed.findings() == []
    signed.register(zoo / "expert-2", "task-2")
    assert signed.watch()[0][:2] == ("folded", 3)
    signed.ask(key="other.pem", versions=["other.pub"])
    assert verb("sign", "tiny")[:2] == (0, "tiny v1\ntiny v2\n")
    assert verb("doctor")[0] == 0


def test_what_a_person_approves_must_be_signed_as_well(signed, zoo):
    from flows.approval import approve

    signed.plain = signed.plain.replace("interval = 3600.0", 'interval = 3600.0\napproval = "always"')
    signed.ask(**OWN)
    signed.register(zoo / "expert-1", "task-1")
    assert signed.watch()[0][:2] == ("needs-approval", 2)
    signature = (signed.stored(2) / SIGNATURE).read_bytes()
    (signed.stored(2) / SIGNATURE).unlink()
    with pytest.raises(FoldinError, match="E_SIGNATURE tiny v2"):
        approve("tiny", 2, "it is good", "ann", str(signed.toml))
    assert signed.champion == 1
    (signed.stored(2) / SIGNATURE).write_bytes(signature)
    approve("tiny", 2, "it is good", "ann", str(signed.toml))
    assert signed.champion == 2


def test_keys_that_are_not_there_cost_no_expert(signed, zoo):
    signed.watch()
    signed.register(zoo / "expert-1", "task-1")
    for wrong in (
        {"experts": ["absent.pub"]},
        {"key": "absent.pem", "versions": ["foldin.pub"]},
        {"key": "team.pem", "versions": ["foldin.pub"]},  # would sign what nobody accepts
    ):
        signed.ask(**wrong)
        with pytest.raises(FoldinError, match=r"E_CONFIG \[lines\.tiny\.signing\]"):
            signed.watch()
        assert signed.findings()[0][0] == "E_CONFIG"
    assert [str(expert.state) for expert in signed.ask().at.ledger.experts("tiny")] in ([], ["pending"])
    assert signed.watch()[0][:2] == ("folded", 2)


@pytest.mark.chaos
def test_a_base_that_came_with_a_signature_does_not_hand_it_on(signed, zoo):
    base = signed.sign(shutil.copytree(zoo / "base", signed.folder / "base"))
    signed.plain = signed.plain.replace(str(zoo / "base"), str(base))
    signed.ask().register(zoo / "expert-1", "task-1")
    assert signed.watch()[0][:2] == ("folded", 2)
    assert not any((signed.stored(number) / SIGNATURE).exists() for number in (1, 2))
    sign_line(signed.ask(**OWN).at, "tiny")
    signed.register(zoo / "expert-2", "task-2")
    assert signed.watch()[0][:2] == ("folded", 3)
    assert signed.findings() == []


@pytest.mark.chaos
def test_an_archived_expert_is_held_to_the_signatures_that_the_line_asks_for_now(signed, zoo, tmp_path):
    from flows.archiving import archive
    from flows.replay import replay

    def replayed(*without):
        facts = replay("tiny", "a test", without=without, who="ann", config_file=str(signed.toml))
        return [(each["state"], each["source"]) for each in facts["experts"]]

    vouched = shutil.copytree(zoo / "expert-2", tmp_path / "vouched")
    (vouched / "training_args.bin").write_bytes(b"signed, and never copied")
    for number, folder in enumerate((zoo / "expert-1", signed.sign(vouched), zoo / "expert-3"), 1):
        signed.register(folder, f"task-{number}")
    signed.watch()
    assert [row["state"] for row in archive(signed.at, "tiny", [], 0.01, "ann")] == ["archived"] * 3
    client = signed.at.mlflow._client
    client.delete_model_version("tiny-experts", "3")
    assert replayed("v1") == [("folded", "original"), ("folded", "archive")]
    client.delete_model_version("tiny-experts", "2")
    signed.ask(experts=["other.pub"])
    with pytest.raises(FoldinError, match=r"E_SIGNATURE archive of expert tiny-experts v2.*not made with an accepted"):
        replayed("v1")
    signed.ask(experts=["team.pub"])
    with pytest.raises(
        FoldinError, match="E_SIGNATURE archive of expert tiny-experts v3: the line asks for a signature"
    ):
        replayed("v1")
    assert replayed("v1", "v3") == [("folded", "archive")]
