"""LoRA adapters as PEFT saves them, read as the tensors of the full checkpoint that they change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from registry.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PLAIN_LORA, read_config
from registry.adapter_names import align, read_keys
from registry.adapter_updates import EMBEDDING, FACTORS, MAGNITUDE, TOKENS, Update, plan_updates
from registry.files import Place
from registry.records import TensorSpec
from registry.weights import Checkpoint, combined_sha256, tensor_sha256


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, Tensor]):
    """A LoRA adapter read as the tensors of the full checkpoint that it changes: base + delta, by the base's names.

    Equal to what PEFT's `merge_and_unload` leaves in these tensors, but in float32 throughout. Every read gives a new
    tensor on the CPU, which the caller may change; nothing is kept. Integer tensors stay the base's own.
    """

    base: Checkpoint
    stored: Checkpoint  # the adapter's own tensors, by their names in its file
    updates: Mapping[str, Update]  # name in the base -> how it changes
    head: Checkpoint  # tensors of modules_to_save that the base lacks, such as a classifier; not among the above

    @classmethod
    def open(cls, folder: Path, base: Checkpoint, where: str = "") -> "Adapter":
        """The adapter in `folder`: adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained.

        Only headers are read. `where` names the adapter in messages.

        Raises:
            FoldinError: E_ADAPTER for what cannot be folded onto `base` exactly, naming the file and the tensor;
                E_FORMAT, E_HEADER, E_DTYPE, E_PATH, E_FILETYPE, E_TOO_LARGE or E_UNREACHABLE for files that are not
                sound, as `Checkpoint.open` and `files.read_json`.
        """
        config = read_config(folder / ADAPTER_CONFIG, where)
        stored = Checkpoint.open_file(folder / ADAPTER_WEIGHTS, where)
        place = Place(where, ADAPTER_WEIGHTS, PLAIN_LORA)
        pieces = read_keys(stored, place)
        wholes = {piece.name for piece in pieces if piece.role == "whole" and config.is_saved(piece.name)}
        names = align({piece.name for piece in pieces}, wholes.__contains__, base.stored.keys(), place)
        updates = plan_updates(pieces, names, stored.specs, base.specs, config, place)
        heads = {piece.key: piece.name for piece in pieces if piece.name not in names}
        return cls(base, stored, updates, stored.only(heads).renamed(heads.__getitem__))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> dtype (F32) and shape (the base's) of the tensors that the adapter changes, sorted by name."""
        return {name: TensorSpec("F32", self.base.stored[name].spec.shape) for name in self}

    @cached_property
    def sha256(self) -> str:
        """What the adapter does, as 64 hex digits: the same for the same update, whatever base it is put on.

        Made of the digests of its stored tensors, head included, by the names of the base and the role they play, and
        of the scaling, orientation and rows that the configuration gives to each. So the spelling of the keys and
        fields that change nothing (dropout, version, task type, the base's path) do not matter, while two adapters
        with the same factors and another lora_alpha differ. Digesting the merged tensors instead would read the whole
        base, and depend on the order in which a processor adds up a product.
        """
        parts = {f"{name} head": tensor_sha256(self.head[name]) for name in self.head}
        for name, update in self.updates.items():
            parts[f"{name} use"] = f"{update.scaling!r} {update.turned} {list(update.rows)}"
            for role, key in update.keys.items():
                parts[f"{name} {role}"] = tensor_sha256(self.stored[key])
        return combined_sha256(parts)

    def __getitem__(self, name: str) -> Tensor:
        """The full tensor, float32, shape of the base's: base + delta. Raises KeyError for tensors it does not change.

        Raises FoldinError E_FORMAT or E_SCHEMA where a file has changed since it was opened.
        """
        update = self.updates[name]
        start = self._start(name)
        if TOKENS in update.keys:
            return start.index_copy(0, torch.tensor(update.rows, dtype=torch.int64), self._part(update, TOKENS))
        if "lora_bias" in update.keys:
            return start + self._part(update, "lora_bias") * update.scaling
        if update.keys.keys() == {"whole"}:
            return start
        left, right = self._product(update)
        changed = start + (left @ right * update.scaling).reshape(start.shape)
        return self._resized(update, changed) if MAGNITUDE in update.keys else changed

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors that the adapter changes, sorted."""
        return iter(sorted(self.updates))

    def __len__(self) -> int:
        """How many tensors of the base it changes."""
        return len(self.updates)

    def __contains__(self, name: object) -> bool:
        """Whether it changes the base's tensor of that name; reads nothing."""
        return name in self.updates

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(left (rows, r), right (cols, r)), float32, with delta == left @ right.T for a base of shape (rows, cols).

        The scaling is in `left`. None where the delta is no such product: DoRA, modules_to_save, trained biases and
        rows, convolutions. Raises like `[name]`.
        """
        update = self.updates[name]
        shape = self.base.stored[name].spec.shape
        if update.keys.keys() - {"whole"} not in ({*FACTORS}, {*EMBEDDING}) or len(shape) != 2:
            return None
        if "whole" in update.keys and not torch.equal(self._start(name), self.base[name].float()):
            return None
        left, right = self._product(update)
        return left * update.scaling, right.T

    def rank(self, name: str) -> int | None:
        """The rank of `factors`, known without reading; None where the delta may not be given as factors."""
        update = self.updates[name]
        if {*update.keys} not in ({*FACTORS}, {*EMBEDDING}) or len(self.base.stored[name].spec.shape) != 2:
            return None
        down = EMBEDDING[0] if EMBEDDING[0] in update.keys else FACTORS[0]
        return self.stored.stored[update.keys[down]].spec.shape[0]

    def rounded_to(self, name: str) -> str:
        """The dtype that a tensor's values were rounded to: of what was stored in place of the base's; else F32.

        What is added to the base as a product carries no rounding of the weights. Raises KeyError as `[name]`.
        """
        keys = self.updates[name].keys
        instead = next((keys[role] for role in ("whole", TOKENS) if role in keys), None)
        return "F32" if instead is None else self.stored.stored[instead].spec.dtype

    def _start(self, name: str) -> Tensor:
        """What the update is added to: the base's tensor, or the one that the adapter brought in its place."""
        update = self.updates[name]
        return self._part(update, "whole") if "whole" in update.keys else self.base[name].float()

    def _part(self, update: Update, role: str) -> Tensor:
        return self.stored[update.keys[role]].float()

    def _product(self, update: Update) -> tuple[Tensor, Tensor]:
        """(rows, r) and (r, cols): their product, times the scaling, is the delta with its kernel flattened."""
        if EMBEDDING[0] in update.keys:
            return self._part(update, EMBEDDING[0]).T, self._part(update, EMBEDDING[1]).T
        down, up = (self._part(update, role).flatten(1) for role in FACTORS)
        return (down.T, up.T) if update.turned else (up, down)

    def _resized(self, update: Update, changed: Tensor) -> Tensor:
        """DoRA: every output of `changed` (the shape of the base) given the norm that the adapter learned for it.

        Outputs are rows; columns in embeddings and turned matrices. arXiv 2402.09353, equation 5, with the norm taken
        over all inputs of an output, as PEFT does.
        """
        by_column = update.turned or EMBEDDING[0] in update.keys
        matrix = changed.flatten(1)
        norm = torch.linalg.norm(matrix, dim=0 if by_column else 1, keepdim=True)
        factor: Tensor = self._part(update, MAGNITUDE).reshape(norm.shape) / norm
        return (factor * matrix).reshape(changed.shape)
