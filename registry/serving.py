"""Which files of a version are its serving weights: all that a thin version lacks."""

from pathlib import Path

from registry.files import read_json
from registry.manifests import MANIFEST

STATE = "foldin.state"  # tag of a version: retired, thin; none where all files are there


def is_serving(name: str) -> bool:
    """Whether a file of a version, by its path, holds serving weights: no head, no state."""
    return "/" not in name and name.endswith(".safetensors")


def serving_files(folder: Path) -> dict[str, str]:
    """The files of a version's serving weights, there or not: name -> SHA-256, by its manifest."""
    files = read_json(folder / MANIFEST)["files"].items()
    return {name: digest for name, digest in files if is_serving(name)}
