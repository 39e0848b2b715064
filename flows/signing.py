"""Signatures as a line asks for them: on every expert that comes in, on every version that goes out."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flows.environment import signing_passphrase
from flows.options import LineConfig, SigningConfig
from flows.versions import verified
from flows.wiring import House
from registry.files import read_json, sha256_file, shown
from registry.intake import Admitted, copied
from registry.manifests import MANIFEST, SIGNATURE
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from registry.signing import Accepted, Signer

CODE = "E_SIGNATURE"


def check_signing(settings: LineConfig, line: str) -> None:
    """Nothing, when a line's keys can be used and what it signs is what it accepts.

    Raises:
        FoldinError: E_CONFIG with the setting and the file.
    """
    accepts = accepted_of(settings, line, "versions")
    accepted_of(settings, line, "experts")
    signer = signer_of(settings.signing)
    if signer is not None:
        from registry.signing import check_signer

        check_signer(signer, accepts, f"[lines.{line}.signing] key")


def accepted_of(settings: LineConfig, line: str, whose: str) -> "tuple[Accepted, ...]":
    """The keys and roots, ready to verify with, that the `versions` or `experts` of a line may be signed with.

    () when they need no signature.

    Raises:
        FoldinError: E_CONFIG for a file that is no such key, or when model-signing is not installed.
    """
    files: tuple[str, ...] = getattr(settings.signing, whose)
    if not files:
        return ()
    where = f"[lines.{line}.signing] {whose}"
    if find_spec("model_signing") is None:
        what, remedy = "it asks for signatures, and model-signing is not installed", "install foldin[signing]"
        raise FoldinError(Refusal("E_CONFIG", what, where, remedy=remedy))
    from registry.signing import accepted

    return accepted(map(Path, files), where)


def signer_of(settings: SigningConfig) -> "Signer | None":
    """What signs a line's versions; None when they are not signed here."""
    if not settings.key:
        return None
    from registry.signing import Signer

    certificate = Path(settings.certificate) if settings.certificate else None
    return Signer(Path(settings.key), certificate, signing_passphrase())


def check_expert(
    accepts: "tuple[Accepted, ...]", files: Admitted, where: str, *, archived: bool = False
) -> Refusal | None:
    """Why an expert's copy is not what an accepted key signed (E_SIGNATURE); None when it is, or nobody asks.

    Every file of the copy must be signed. A file that was signed and not copied must lie beside those that were; of an
    `archived` expert that can no longer be seen, and it is enough that it is none of those that are copied.
    """
    if not accepts:
        return None
    from registry.signing import SIGN, difference, signed_files

    found = {name: digest for name, digest in files.files_sha256.items() if name != SIGNATURE}
    if len(found) == len(files.files_sha256):
        expected = f"{SIGNATURE} beside the weights, by one of {', '.join(each.name for each in accepts)}"
        return Refusal(CODE, "the line asks for a signature and there is none", where, expected=expected, remedy=SIGN)
    signed = signed_files(files.folder / SIGNATURE, accepts, where)
    if isinstance(signed, Refusal):
        return signed
    ignored = [shown(name) for name in signed if not copied(name)] if archived else files.ignored
    return difference(signed, found, where, ignored)


def sign_version(house: House, line: str, version: int, folder: Path) -> bool:
    """Sign a version whose files are those of its manifest, if the line asks for it; whether that was needed.

    What is signed are the digests in the manifest and the manifest's own. A good signature that is there stays.

    Args:
        house: where the line is.
        line: its name.
        version: registered; its files were compared with its manifest.
        folder: with that manifest.

    Raises:
        FoldinError: E_SIGNATURE when there is no good signature and the line has no key to make one.
    """
    settings = house.config.line(line)
    accepts, signer = accepted_of(settings, line, "versions"), signer_of(settings.signing)
    wrong = _wrong(house, line, version, folder, accepts)
    if wrong is None:
        return False
    if signer is not None:
        from registry.signing import sign

        with TemporaryDirectory() as scratch:
            signature = Path(scratch) / SIGNATURE
            sign(_digests(folder), f"{line} v{version}", signer, signature, f"[lines.{line}.signing] key")
            house.mlflow.attach(line, version, signature)
        wrong = _wrong(house, line, version, folder, accepts)  # as it is stored
    if wrong is not None:
        raise FoldinError(wrong)
    return True


def require_signature(house: House, line: str, version: int, folder: Path) -> None:
    """Nothing, when a version has the signature that its line asks for; arguments as of `sign_version`.

    Raises:
        FoldinError: E_SIGNATURE, naming the file that is not as it was signed.
    """
    accepts = accepted_of(house.config.line(line), line, "versions")
    wrong = _wrong(house, line, version, folder, accepts)
    if wrong is not None:
        raise FoldinError(wrong)


def sign_line(house: House, line: str) -> list[int]:
    """Sign the versions of a line, each verified first, that have no good signature; which ones those were.

    Raises:
        FoldinError: E_CONFIG when the line has no key, or as `verified` and `sign_version`.
    """
    settings = house.config.line(line)
    if not settings.signing.key:
        what, remedy = (
            "the line has no key to sign with",
            "name a private key there; docs/signing.md says how",
        )
        raise FoldinError(Refusal("E_CONFIG", what, f"[lines.{line}.signing]", remedy=remedy))
    check_signing(settings, line)
    numbers = list(house.ledger.parents(line))
    return [each for each in numbers if sign_version(house, line, each, verified(house, line, each)[0])]


def _wrong(house: House, line: str, version: int, folder: Path, accepts: "tuple[Accepted, ...]") -> Refusal | None:
    if not accepts:
        return None
    from registry.signing import difference, signed_files

    where = f"{line} v{version}"
    remedy = f"find out why; if its files are right, sign it with `foldin sign {line}`"
    with TemporaryDirectory() as scratch:
        signature = house.mlflow.signature(line, version, Path(scratch))
        if signature is None:
            what, expected = "the version has no signature", f"one by {', '.join(each.name for each in accepts)}"
            return Refusal(CODE, what, where, SIGNATURE, expected=expected, remedy=f"sign it with `foldin sign {line}`")
        signed = signed_files(signature, accepts, where, remedy)
    return signed if isinstance(signed, Refusal) else difference(signed, _digests(folder), where, remedy=remedy)


def _digests(folder: Path) -> Mapping[str, str]:
    """Every file of a version, the manifest included, without reading any other than that."""
    return {**read_json(folder / MANIFEST)["files"], MANIFEST: sha256_file(folder / MANIFEST)}
