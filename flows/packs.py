"""The tensors of an expert, packed one by one into the files of its archive."""

from pathlib import Path
from typing import TYPE_CHECKING

from flows.restoring import Kept
from flows.telling import bar
from flows.versions import Version
from registry.files import Place
from registry.records import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from merging.packing import Packed
    from registry.weights import Checkpoint

SHARD = 64 * 2**20  # bytes of packed changes that are held before they are written


def pack_all(
    folder: Path,  # gets the files
    base: Version,
    expert: "Checkpoint",
    tolerance: float,  # of each tensor's change
    where: str,
) -> tuple[dict[str, Kept], float]:
    """Tensor of the expert -> how it is kept, and the error of the whole model's change as measured.

    One tensor in memory at a time, and at most SHARD bytes of what was packed.

    Raises:
        FoldinError: E_ARCHIVE for a change that is not finite, or as `Checkpoint` and `write_part`.
    """
    from merging.measure import quadrature
    from registry.weights import tensor_sha256

    weights = base.weights()
    of = counterparts(base, weights, expert)
    names = sorted(expert, key=lambda name: (not of[name], name))
    kept, errors, norms, seen, files = dict[str, Kept](), list[float](), list[float](), dict[str, str](), _Files(folder)
    with bar(f"packing {len(names)} tensors") as progress:
        for number, name in enumerate(names, 1):
            tensor, spec = expert[name], expert.stored[name].spec
            digest = tensor_sha256(tensor)
            if of[name]:
                packed = _packed(weights[of[name]], tensor, tolerance, Place(where, expert.stored[name].file), name)
                errors.append(packed.error * packed.norm)
                norms.append(packed.norm)
                kept[name] = files.add(name, packed, of[name], spec)
                seen[digest] = name
            elif digest in seen:  # tied to one that the base has: both must come back alike
                kept[name] = Kept("copy", seen[digest], *spec)
            else:
                kept[name] = files.add(name, _exactly(tensor), "", spec)
            progress(number, len(names))
    files.write()
    return kept, quadrature(errors) / (quadrature(norms) or 1.0)


def counterparts(base: Version, weights: "Checkpoint", expert: "Checkpoint") -> dict[str, str]:
    """Tensor of the expert -> the base's of that name and shape; "" where there is none.

    Task models store the base's tensors below a prefix such as `vit.`.
    """
    from evaluation.models import base_prefix

    prefix = "" if any(name in weights for name in expert) else base_prefix(base.folder, list(weights))
    names = {name: name.removeprefix(prefix) for name in expert}
    return {name: of if _alike(name, of, weights, expert) else "" for name, of in names.items()}


def _alike(name: str, of: str, weights: "Checkpoint", expert: "Checkpoint") -> bool:
    return of in weights and weights.stored[of].spec.shape == expert.stored[name].spec.shape


def _packed(base: "Tensor", tensor: "Tensor", tolerance: float, place: Place, name: str) -> "Packed":
    from merging import MergeError
    from merging.packing import pack

    try:
        return pack(base, tensor, tolerance)
    except MergeError as error:
        raise place.refuse("E_ARCHIVE", "a change cannot be packed", found=str(error), tensor=name) from error


def _exactly(tensor: "Tensor") -> "Packed":
    from merging.packing import Packed

    return Packed("exact", {"exact": tensor})


class _Files:
    """The files of packed changes, each written when it is full."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 1
        self._waiting: dict[str, Tensor] = {}

    def add(self, name: str, packed: "Packed", of: str, spec: TensorSpec) -> Kept:
        """Take one tensor's parts; where they will be."""
        file, size = f"{self._number:05}.safetensors", sum(part.nbytes for part in packed.parts.values())
        self._waiting |= {f"{name}:{part}": tensor for part, tensor in packed.parts.items()}
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= SHARD:
            self.write()
        parts = tuple(sorted(packed.parts))
        return Kept(packed.form, of, *spec, file if parts else "", parts, size, packed.error)

    def write(self) -> None:
        """Write what was taken since the last file, wide dtypes first, so that every part is aligned."""
        from registry.weights import spec_of
        from registry.writer import Entry, write_part

        if self._waiting:
            order = sorted(self._waiting, key=lambda key: (-self._waiting[key].element_size(), key))
            specs = {key: spec_of(self._waiting[key]) for key in order}
            entries = (Entry(key, self._waiting[key]) for key in order)
            write_part(self._folder / f"{self._number:05}.safetensors", specs, entries)
            self._waiting, self._number = {}, self._number + 1
