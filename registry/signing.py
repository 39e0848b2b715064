"""OpenSSF model signing: who vouches for a folder's files. The only file that imports model_signing.

The digests are known here, from the manifest of a version or from the copy of an expert, so no file is read again: what
is signed and compared are those digests, in the library's own format. `python -m model_signing verify` on the folder
reads the files themselves and comes to the same answer.
"""

import base64
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509 import DuplicateExtension, InvalidVersion, UnsupportedGeneralNameType
from model_signing import hashing, manifest, signing, verifying
from model_signing._hashing.hashing import Digest  # the library offers no other way to say what a digest is
from OpenSSL import crypto

from registry.files import MAX_JSON, Place, open_regular, parse_json, shown
from registry.manifests import MANIFEST, SIGNATURE
from registry.records import FoldinError, Refusal

CODE = "E_SIGNATURE"
SIGN = "sign the folder as it is with an accepted key, and register the result as a new version"
# All that the library and the two below it raise about keys, certificates and bundles. What the system says (OSError)
# is not among them: it speaks neither for nor against a signature.
WRONG = (
    *(ValueError, TypeError, LookupError, AttributeError, InvalidSignature, UnsupportedAlgorithm),
    *(DuplicateExtension, InvalidVersion, UnsupportedGeneralNameType, crypto.Error, crypto.X509StoreContextError),
)


@dataclass(frozen=True)
class Accepted:
    """Something that a signature may be made with: a public key, or root certificates."""

    name: str  # of its file
    verifier: verifying.Config


@dataclass(frozen=True)
class Signer:
    """What signs: a private key on an elliptic curve, alone or as the holder of a certificate."""

    key: Path  # PEM
    certificate: Path | None = None  # PEM: the key's own first, then those between it and the root
    passphrase: bytes = b""  # for a key that is encrypted


class Known:
    """Stands where the library expects the hashing of a folder: here all digests are known."""

    def __init__(self, name: str, files: Mapping[str, str]) -> None:
        self._name, self._files = name, files

    def hash(self, model_path: Path, *, files_to_hash: Iterable[Path] | None = None) -> manifest.Manifest:
        """The manifest of the known files; `model_path` is not looked at. Raises ValueError for a strange digest."""
        kind = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
        )
        items = [kind.new_item(name, Digest("sha256", bytes.fromhex(sha))) for name, sha in self._files.items()]
        return manifest.Manifest(self._name, items, kind)

    def add_ignored_paths(self, *, model_path: Path, paths: Iterable[Path]) -> None:
        """Nothing: what a signature ignores is not among the files that it lists."""

    @property
    def config(self) -> hashing.Config:
        """This, under the name that the library's types ask for; it calls the two functions above and no other."""
        return cast(hashing.Config, self)


def accepted(paths: Iterable[Path], where: str) -> tuple[Accepted, ...]:
    """The public keys (EC, PEM) and root certificates (PEM) of some files, ready to verify with.

    Raises:
        FoldinError: E_CONFIG for a file that cannot be read or is neither; `where` names the setting.
    """
    return tuple(Accepted(path.name, _verifier(path, where)) for path in paths)


def _verifier(path: Path, where: str) -> verifying.Config:
    config = verifying.Config()
    place = Place(where, str(path), "give a file in PEM; docs/signing.md says how to make one")
    try:
        if b"BEGIN CERTIFICATE" in path.read_bytes():
            return config.use_certificate_verifier(certificate_chain=[path])
        return config.use_elliptic_key_verifier(public_key=path)
    except (OSError, *WRONG) as error:
        expected = "a public key on the curve P-256, P-384 or P-521, or root certificates"
        raise place.refuse("E_CONFIG", "the key cannot be used", expected, shown(str(error))) from error


def sign(files: Mapping[str, str], name: str, signer: Signer, signature: Path, where: str) -> None:
    """Write the signature of a folder's files (relative posix path -> SHA-256); `name` of the model is only shown.

    Raises:
        FoldinError: E_CONFIG for a key or certificate that cannot be used; `where` names the setting.
    """
    place = Place(where, str(signer.key), "give a private key in PEM; docs/signing.md says how to make one")
    try:
        config = _signer(signer)
        config.set_hashing_config(Known(name, files).config).sign(name, signature)
    except (OSError, *WRONG) as error:
        raise place.refuse("E_CONFIG", "the key cannot sign", found=shown(str(error))) from error


def _signer(signer: Signer) -> signing.Config:
    config = signing.Config()
    if signer.certificate is not None:
        own = signer.certificate
        return config.use_certificate_signer(private_key=signer.key, signing_certificate=own, certificate_chain=[own])
    encrypted = b"ENCRYPTED" in signer.key.read_bytes()
    passphrase = cast(str, signer.passphrase) if encrypted else None  # it asks for str, but cryptography takes bytes
    return config.use_elliptic_key_signer(private_key=signer.key, password=passphrase)


def check_signer(signer: Signer, accepts: Sequence[Accepted], where: str) -> None:
    """Nothing, when what the key signs is accepted; tried on a made-up file.

    Raises:
        FoldinError: E_CONFIG when it is not, or as `sign`.
    """
    with TemporaryDirectory() as folder:
        signature = Path(folder) / SIGNATURE
        sign({"probe": "0" * 64}, "probe", signer, signature, where)
        found = signed_files(signature, accepts, where)
    if isinstance(found, Refusal):
        remedy = "put the key's public half, or the root of its certificate, into versions"
        what = "what the key signs would not be accepted"
        raise Place(where, str(signer.key), remedy).refuse("E_CONFIG", what, found.expected, found.found)


def signed_files(
    signature: Path, accepts: Sequence[Accepted], where: str, remedy: str = SIGN
) -> dict[str, str] | Refusal:
    """What an accepted key signed, relative posix path -> SHA-256; or why the signature (E_SIGNATURE) counts nothing.

    Raises:
        FoldinError: E_FILETYPE or E_UNREACHABLE when the signature cannot be read.
    """
    place = Place(where, SIGNATURE, remedy)
    with open_regular(signature, where) as file:
        text = file.read(MAX_JSON + 1)
    try:
        files, made = _listed(text, place)
    except FoldinError as error:
        return error.refusal
    if any(_verifies(each, signature, files) for each in accepts):
        return files
    expected = f"one of {', '.join(each.name for each in accepts)}"
    return place.refuse(CODE, "the signature was not made with an accepted key", expected, made).refusal


def _verifies(accept: Accepted, signature: Path, files: Mapping[str, str]) -> bool:
    """Whether a key made the signature, and the library reads the same list of files out of it."""
    try:
        accept.verifier.set_hashing_config(Known("", files).config).verify(Path(), signature)
    except WRONG:
        return False
    return True


def _listed(text: bytes, place: Place) -> tuple[dict[str, str], str]:
    """What a bundle says it signs, and with what: a Sigstore bundle around an in-toto statement. Nothing is proven yet.

    Format: the payload in model_signing's documentation (predicate https://model_signing/signature/v1.0).
    """
    try:
        bundle = parse_json(text, place, CODE)
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        predicate = parse_json(payload, place, CODE)["predicate"]
        resources, material = predicate["resources"], bundle["verificationMaterial"]
        files = {str(each["name"]): str(each["digest"]) for each in resources if each["algorithm"] == "sha256"}
        made = _maker(material)
    except (ValueError, TypeError, LookupError) as error:
        found = shown(f"{type(error).__name__}: {error}")
        raise place.refuse(CODE, "the signature is not a bundle of model signing", found=found) from error
    if len(files) != len(resources):
        what, expected = "the signature does not list files by their SHA-256", "each file once, with its SHA-256"
        raise place.refuse(CODE, what, expected, shown(json.dumps(predicate.get("serialization"))))
    return files, shown(made)


def _maker(material: Mapping[str, Mapping[str, str]]) -> str:
    """What a bundle says it was made with: a key, by the SHA-256 of its public half, or a certificate."""
    if "publicKey" not in material:
        return "a certificate"
    if not material["publicKey"]["hint"]:  # the library takes it for one of its first releases, and prints a warning
        raise ValueError("the key is not named")
    return f"key {material['publicKey']['hint'][:12]}"


def difference(
    signed: Mapping[str, str],
    found: Mapping[str, str],
    where: str,
    unused: Collection[str] = (),
    remedy: str = SIGN,
) -> Refusal | None:
    """The first file that is not as it was signed (E_SIGNATURE), a manifest last; None when all are.

    Args:
        signed: what `signed_files` says.
        found: what is there, relative posix path -> SHA-256, without the signature.
        where: names the folder in messages.
        unused: files, as `shown` gives them, that lie beside those and are not used; they may have been signed as well.
        remedy: what to do.
    """
    for name in sorted({*signed, *found}, key=lambda name: (name == MANIFEST, name)):
        if signed.get(name) != found.get(name) and (name in found or shown(name) not in unused):
            place = Place(where, shown(name), remedy)
            if name not in signed:
                return place.refuse(CODE, "the signature does not cover the file").refusal
            what = "the file was changed after it was signed" if name in found else "a file that was signed is missing"
            return place.refuse(CODE, what, shown(signed[name]), found.get(name, "")).refusal
    return None
