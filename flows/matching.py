"""Names and tokens of an expert matched with the base's: weights tied under two names, vocabularies of other ids."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.kinds import stored_twice
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from registry.weights import Checkpoint

BESIDE = ("merges.txt", "added_tokens.json")  # they change what a vocabulary says, and are none without it


def untied(expert: "Checkpoint", base: "Checkpoint", aliases: Mapping[str, str], where: str) -> "Checkpoint | Refusal":
    """The expert with each tied weight under the one name that is folded; both names must hold the same values."""
    import torch

    renamed, dropped = dict[str, str](), set[str]()
    for name, kept in aliases.items():
        if name not in expert or (name in base and not stored_twice(base, name, kept)):
            continue
        twin = kept if kept in expert else next((other for other, to in renamed.items() if to == kept), None)
        if twin is None:
            renamed[name] = kept
        elif torch.equal(expert[name], expert[twin]):
            dropped.add(name)
        else:
            what = f"it is tied to {kept} in the base and holds other values in the expert"
            return Refusal("E_SCHEMA", what, where, tensor=name, remedy="tie the two again, and train it once more")
    return expert.only(set(expert) - dropped).renamed(lambda name: renamed.get(name, name))


def vocabulary_rows(
    base: "Checkpoint",
    expert: "Checkpoint",
    tables: Collection[str],  # names of the tensors with a row per token
    where: str,
) -> dict[str, tuple[int, ...]] | Refusal:
    """Per vocabulary tensor the expert's row for each of the base's; none where both have the same tokens.

    Raises:
        FoldinError: where the base's configuration or tokenizer cannot be used. A base that has no tokenizer is sound;
            only, no expert with another vocabulary can be matched with it.
    """
    own = {name: base.stored[name].spec.shape[0] for name in sorted(tables) if name in base and name in expert}
    new = {name: expert.stored[name].spec.shape[0] for name in own}
    if not own or (own == new and same_tokenizer(base.folder, expert.folder)):
        return {}
    matched = {count: _matched(base, expert, count, where) for count in set(own.values())}
    rows: dict[str, tuple[int, ...]] = {}
    for name, count in own.items():
        found = matched[count]
        if isinstance(found, Refusal):
            return replace(found, tensor=name)
        if max(found, default=-1) >= new[name]:
            what = "the tokenizer has more tokens than the tensor has rows"
            remedy = "save the tokenizer it was trained with"
            return Refusal("E_VOCABULARY", what, where, "", name, f"{max(found) + 1} rows", f"{new[name]}", remedy)
        if count != new[name] or any(row >= 0 and row != place for place, row in enumerate(found)):
            rows[name] = found
    return rows


def _matched(base: "Checkpoint", expert: "Checkpoint", rows: int, where: str) -> tuple[int, ...] | Refusal:
    from evaluation.configs import vocabulary_files
    from evaluation.vocabulary import matched_rows

    found = matched_rows(base.folder, expert.folder, rows, where)
    if not isinstance(found, Refusal) or found.where == where:
        return found
    if found.code == "E_VOCABULARY" and not vocabulary_files(base.folder):
        return found
    raise FoldinError(replace(found, where=base.where))


def same_tokenizer(base: Path, expert: Path) -> bool:
    """Whether both count the same tokens: by the files that both have, or because one of the two has no vocabulary."""
    from evaluation.configs import vocabulary_files

    own, new = vocabulary_files(base), vocabulary_files(expert)
    beside = {name for name in BESIDE if (base / name).exists() and (expert / name).exists()}
    if any((base / name).read_bytes() != (expert / name).read_bytes() for name in own & new | beside):
        return False
    return bool(own & new) or not (own and new)
