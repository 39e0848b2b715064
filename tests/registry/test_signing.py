"""Signatures: what the library signs is accepted here, and what is signed here by the library; nothing else is."""

import base64
import json
import random
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from model_signing import hashing, signing, verifying

from registry.files import hash_tree
from registry.manifests import SIGNATURE, verify_manifest, write_manifest
from registry.records import FoldinError, Refusal
from registry.signing import Signer, accepted, check_signer, difference, sign, signed_files

PEM = serialization.Encoding.PEM


def write_key(path, key=None, passphrase=b""):
    """A private key in PEM, its public half beside it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return key


def certify(key, name, issuer_key, issuer, *, authority=False, signs=True):
    """A certificate of a key that an issuer made."""
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer))
    start = datetime.now(UTC) - timedelta(days=1)
    usage = {
        "key_cert_sign": authority,
        "content_commitment": not signs,
        **dict.fromkeys(("key_encipherment", "data_encipherment", "key_agreement"), False),
        **dict.fromkeys(("crl_sign", "encipher_only", "decipher_only"), False),
    }
    made = x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(start).not_valid_after(start + timedelta(days=30))
    made = made.add_extension(x509.BasicConstraints(authority, None), critical=True)
    made = made.add_extension(x509.KeyUsage(digital_signature=signs, **usage), critical=True)
    return made.sign(issuer_key, hashes.SHA256()).public_bytes(PEM)


@pytest.fixture
def keys(tmp_path):
    """A folder with the keys `own` and `other`, and `own.crt`, which `middle` certifies, which `root.crt` certifies."""
    folder = tmp_path / "keys"
    folder.mkdir()
    own, _, middle, root = (write_key(folder / f"{name}.pem") for name in ("own", "other", "middle", "root"))
    (folder / "root.crt").write_bytes(certify(root, "root", root, "root", authority=True))
    between = certify(middle, "middle", root, "root", authority=True)
    (folder / "own.crt").write_bytes(certify(own, "own", middle, "middle") + between)
    (folder / "idle.crt").write_bytes(certify(own, "idle", middle, "middle", signs=False) + between)
    stranger = ec.generate_private_key(ec.SECP256R1())
    (folder / "stranger.crt").write_bytes(certify(stranger, "root", stranger, "root", authority=True))
    return folder


@pytest.fixture
def model(tmp_path):
    """A folder of files."""
    folder = tmp_path / "model"
    (folder / "foldin").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "foldin/manifest.json"):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def library(keys, model, key="own"):
    """The folder signed by the library, the signature inside, as its command line does it."""
    signature = model / SIGNATURE
    config = signing.Config().use_elliptic_key_signer(private_key=keys / f"{key}.pem")
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[signature])).sign(model, signature)
    return signature


def refused(found, what):
    assert isinstance(found, Refusal), found
    assert found.code == "E_SIGNATURE"
    assert what in found.what
    return found


def files_of(model):
    return {name: digest for name, digest in hash_tree(model).items() if name != SIGNATURE}


def take(keys, *names):
    return accepted([keys / name for name in names], "[lines.tiny.signing] experts")


def test_what_the_library_signs_is_accepted(keys, model):
    signed = signed_files(library(keys, model), take(keys, "other.pub", "own.pub"), "expert e v1")
    assert signed == files_of(model)
    assert difference(signed, files_of(model), "expert e v1") is None


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_what_is_signed_here_the_library_verifies_from_the_files(keys, model, curve):
    write_key(keys / "curve.pem", ec.generate_private_key(curve()))
    signature = model / SIGNATURE
    sign(files_of(model), "tiny v2", Signer(keys / "curve.pem"), signature, "key")
    config = verifying.Config().use_elliptic_key_verifier(public_key=keys / "curve.pub")
    config.verify(model, signature)
    (model / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"Hash mismatch for .*model\.safetensors"):
        config.verify(model, signature)


def test_a_changed_byte_a_new_file_and_a_lost_one_are_named(keys, model):
    signed, before = signed_files(library(keys, model), take(keys, "own.pub"), "e"), files_of(model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[7] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    changed = refused(difference(signed, files_of(model), "e"), "changed after it was signed")
    assert (changed.file, changed.expected) == ("model.safetensors", before["model.safetensors"])
    extra = refused(difference(signed, {**before, "suite.json": "0" * 64}, "e"), "does not cover")
    assert extra.file == "suite.json"
    del before["config.json"]
    assert refused(difference(signed, before, "e"), "missing").file == "config.json"
    assert difference(signed, before, "e", unused=["config.json"]) is None


def test_a_file_that_is_not_used_excuses_no_change(keys, model):
    signed = signed_files(library(keys, model), take(keys, "own.pub"), "e")
    found = {**files_of(model), "config.json": "0" * 64}
    assert refused(difference(signed, found, "e", unused=["config.json"]), "changed").file == "config.json"


def test_the_signature_of_another_folder_does_not_fit(keys, model, tmp_path):
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "model.safetensors").write_bytes(b"another model")
    signed = signed_files(library(keys, twin), take(keys, "own.pub"), "e")
    assert refused(difference(signed, files_of(model), "e"), "does not cover").file == "config.json"


def test_another_key_is_refused_and_both_are_named(keys, model):
    found = refused(
        signed_files(library(keys, model, "other"), take(keys, "own.pub"), "e"), "not made with an accepted"
    )
    assert found.expected == "one of own.pub"
    assert found.found.startswith("key ")
    assert found.file == SIGNATURE


def test_a_payload_that_was_exchanged_is_refused(keys, model):
    signature = library(keys, model)
    bundle = json.loads(signature.read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "0" * 64
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    signature.write_text(json.dumps(bundle))
    assert refused(signed_files(signature, take(keys, "own.pub"), "e"), "not made with an accepted key")


def test_two_lists_in_one_payload_are_refused_although_the_signature_is_good(keys, model, monkeypatch):
    signature, real = library(keys, model), json.loads
    monkeypatch.setattr("registry.files.json.loads", lambda text, **how: _swap(real(text, **how)))
    assert refused(signed_files(signature, take(keys, "own.pub"), "e"), "not made with an accepted key")


def _swap(value):
    """What a parser that reads the list of files otherwise than the library would say."""
    for each in value.get("predicate", {}).get("resources", []):
        each["digest"] = "0" * 64
    return value


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"[]", b"{}", b'{"dsseEnvelope": {}}', b'{"dsseEnvelope": {"payload": "e30="}}', b"[" * 9999],
)
def test_what_is_no_bundle_is_refused(keys, tmp_path, text):
    (tmp_path / SIGNATURE).write_bytes(text)
    found = signed_files(tmp_path / SIGNATURE, take(keys, "own.pub", "root.crt"), "e")
    assert isinstance(found, Refusal)
    assert found.code == "E_SIGNATURE"


@pytest.mark.parametrize("certified", [False, True])
def test_a_damaged_bundle_is_refused_or_says_the_same(keys, model, tmp_path, capsys, certified):
    accepts, signature = take(keys, "own.pub", "root.crt"), tmp_path / "damaged.sig"
    signer = Signer(keys / "own.pem", keys / "own.crt" if certified else None)
    sign(files_of(model), "tiny", signer, signature, "key")
    text, chance = signature.read_bytes(), random.Random(7)
    assert signed_files(signature, accepts, "e") == files_of(model)
    for _ in range(300):
        damaged = bytearray(text)
        for _ in range(chance.choice((1, 1, 2, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        signature.write_bytes(damaged)
        found = signed_files(signature, accepts, "e")
        assert isinstance(found, Refusal) or found == files_of(model)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("hint", [None, "", 7])
def test_a_bundle_that_does_not_name_its_key_is_refused_and_nothing_is_printed(keys, model, capsys, hint):
    signature = library(keys, model)
    bundle = json.loads(signature.read_text())
    bundle["verificationMaterial"]["publicKey"] = {} if hint is None else {"hint": hint}
    signature.write_text(json.dumps(bundle))
    refused(signed_files(signature, take(keys, "own.pub"), "e"), "not a bundle")
    assert capsys.readouterr().out == ""


def test_files_signed_in_shards_or_with_another_hash_are_refused_with_a_reason(keys, model):
    signature = model / SIGNATURE
    for hashed in (
        hashing.Config().use_shard_serialization(),
        hashing.Config().use_file_serialization(hashing_algorithm="blake2"),
    ):
        config = signing.Config().use_elliptic_key_signer(private_key=keys / "own.pem").set_hashing_config(hashed)
        config.sign(model, signature)
        found = refused(signed_files(signature, take(keys, "own.pub"), "e"), "does not list files by their SHA-256")
        assert "method" in found.found
        signature.unlink()


def test_a_certificate_is_accepted_by_its_root_and_by_no_other(keys, model):
    signature = model / SIGNATURE
    sign(files_of(model), "tiny", Signer(keys / "own.pem", keys / "own.crt"), signature, "key")
    assert signed_files(signature, take(keys, "root.crt"), "e") == files_of(model)
    verifying.Config().use_certificate_verifier(certificate_chain=[keys / "root.crt"]).verify(model, signature)
    for other in ("stranger.crt", "own.pub"):
        assert refused(signed_files(signature, take(keys, other), "e"), "not made").found == "a certificate"


def test_a_certificate_that_is_not_for_signing_is_refused(keys, model):
    signature = model / SIGNATURE
    sign(files_of(model), "tiny", Signer(keys / "own.pem", keys / "idle.crt"), signature, "key")
    with pytest.warns(DeprecationWarning, match="warn"):  # of the library, which logs what the certificate lacks
        refused(signed_files(signature, take(keys, "root.crt"), "e"), "not made with an accepted key")


def test_keys_that_cannot_be_used_are_an_error_of_the_configuration(keys):
    write_key(keys / "rsa.pem", rsa.generate_private_key(65537, 2048))
    write_key(keys / "curve.pem", ec.generate_private_key(ec.SECP256K1()))
    (keys / "empty.pub").write_bytes(b"")
    for name in ("rsa.pub", "curve.pub", "empty.pub", "own.pem", "absent.pub"):
        with pytest.raises(FoldinError) as error:
            take(keys, name)
        assert error.value.refusal.code == "E_CONFIG"
        assert name in str(error.value)
        assert "[lines.tiny.signing] experts" in str(error.value)
    for name in ("rsa.pem", "own.pub", "absent.pem"):
        with pytest.raises(FoldinError, match=f"E_CONFIG .*{name}.*cannot sign"):
            sign({}, "tiny", Signer(keys / name), keys / SIGNATURE, "[lines.tiny.signing] key")


def test_an_encrypted_key_needs_its_passphrase_which_no_message_holds(keys):
    write_key(keys / "locked.pem", passphrase=b"open sesame")
    accepts = take(keys, "locked.pub", "own.pub")
    check_signer(Signer(keys / "locked.pem", passphrase=b"open sesame"), accepts, "key")
    check_signer(Signer(keys / "own.pem", passphrase=b"open sesame"), accepts, "key")  # it needs none
    for wrong in (b"", b"guessed word"):
        with pytest.raises(FoldinError) as error:
            check_signer(Signer(keys / "locked.pem", passphrase=wrong), accepts, "key")
        assert error.value.refusal.code == "E_CONFIG"
        assert "guessed" not in str(error.value)


def test_a_key_whose_signatures_would_not_be_accepted_is_an_error_of_the_configuration(keys):
    check_signer(Signer(keys / "own.pem", keys / "own.crt"), take(keys, "root.crt"), "key")
    for signer, accepts in (
        (Signer(keys / "own.pem"), ("other.pub", "root.crt")),
        (Signer(keys / "own.pem", keys / "own.crt"), ("own.pub",)),
        (Signer(keys / "other.pem", keys / "own.crt"), ("root.crt",)),
    ):
        with pytest.raises(FoldinError) as error:
            check_signer(signer, take(keys, *accepts), "key")
        assert error.value.refusal.code == "E_CONFIG"


def test_a_manifest_neither_lists_nor_misses_the_signature(keys, model):
    (model / "foldin/manifest.json").unlink()
    digest = write_manifest(model, {})
    library(keys, model)
    assert verify_manifest(model) == []
    assert write_manifest(model, {}) == digest
    (model / "model.sig2").write_bytes(b"")
    assert [each.file for each in verify_manifest(model)] == ["model.sig2"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_the_keys_that_the_document_makes_sign_and_are_accepted(tmp_path):
    text = (Path(__file__).resolve().parents[2] / "docs/signing.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith(("openssl ", "printf "))]
    assert len(commands) == 6
    subprocess.run(["sh", "-ec", "\n".join(commands)], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    check_signer(Signer(tmp_path / "foldin.pem"), take(tmp_path, "foldin.pub"), "key")
    check_signer(Signer(tmp_path / "foldin.pem", tmp_path / "foldin.crt"), take(tmp_path, "root.crt"), "key")
