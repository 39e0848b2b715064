"""How an adapter changes each tensor of the base: its pieces put together, every shape, rank and partner checked."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from registry.adapter_config import AdapterConfig
from registry.adapter_names import WHOLE, Piece
from registry.files import Place, shown
from registry.records import TensorSpec

FLOATS = ("F64", "F32", "F16", "BF16")
FACTORS = ("lora_A", "lora_B")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"
Specs = Mapping[str, TensorSpec]


class Update(NamedTuple):
    """How an adapter changes one tensor of the base."""

    keys: Mapping[str, str]  # role -> the tensor of the adapter's file that plays it
    path: str  # of the module in the running model
    scaling: float = 1.0  # of B @ A and of lora_bias
    turned: bool = False  # the base stores (in, out), as GPT-2's Conv1D does
    rows: tuple[int, ...] = ()  # of trainable_tokens_delta


def plan_updates(
    pieces: Iterable[Piece],
    names: Mapping[str, str],  # in the running model -> in the base
    specs: Specs,  # of the adapter's own tensors
    base: Specs,
    config: AdapterConfig,
    place: Place,
) -> dict[str, Update]:
    """Name in the base -> how it changes; pieces without such a name, and integer tensors stored whole, are left out.

    Raises:
        FoldinError: E_ADAPTER for a missing partner, a shape or rank that does not fit, or an unclear orientation.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.name in names:
            groups.setdefault(names[piece.name], []).append(piece)
    updates = {}
    for name, group in sorted(groups.items()):
        keys = _roles(group, place)
        if base[name].dtype in FLOATS or keys.keys() != {"whole"}:
            updates[name] = _checked(Update(keys, group[0].path), base[name], specs, config, place)
    _check_biases(updates, config, place)
    return _oriented(updates, base, specs, config.turned, place)


def _roles(group: Collection[Piece], place: Place) -> dict[str, str]:
    """Role -> key of the pieces of one tensor, when they make sense together."""
    keys: dict[str, str] = {}
    for piece in group:
        role = "whole" if piece.role in WHOLE else piece.role
        hidden = piece.role == "whole" and piece.name.endswith(".weight") and len(group) > 1  # PEFT would not load it
        if role in keys or hidden:
            raise place.refuse("E_ADAPTER", "the adapter holds this tensor twice", "once", tensor=shown(piece.key))
        keys[role] = piece.key
    for one, other in (FACTORS, FACTORS[::-1], EMBEDDING, EMBEDDING[::-1]):
        if one in keys and other not in keys:
            raise place.refuse("E_ADAPTER", f"its partner {other} is missing", "both", tensor=shown(keys[one]))
    changes = keys.keys() - {"whole", MAGNITUDE}
    alone = keys.keys() in ({TOKENS}, {"whole"})
    if not alone and changes not in ({*FACTORS}, {*EMBEDDING}, {"lora_bias"}):
        found = ", ".join(sorted(keys))
        raise place.refuse("E_ADAPTER", "these parts do not go together", found=found, tensor=shown(min(keys.values())))
    return keys


def _checked(update: Update, base: TensorSpec, specs: Specs, config: AdapterConfig, place: Place) -> Update:
    """The update with its scaling or rows, when its dtypes and shapes agree with the base and the configuration.

    Factors are checked for their rank only, because the rest of their shape depends on the orientation.
    """
    keys = update.keys
    for key in keys.values():
        if {specs[key].dtype, base.dtype} - set(FLOATS):
            what, found = "the update is not of floating point", f"{specs[key].dtype} on {base.dtype}"
            raise place.refuse("E_ADAPTER", what, ", ".join(FLOATS), found, shown(key))
    for role in sorted({"whole", "lora_bias"} & keys.keys()):
        _check_shape(keys[role], specs, base.shape, place)
    if TOKENS in keys:
        rows = _rows(keys[TOKENS], update.path, base.shape, config, place)
        _check_shape(keys[TOKENS], specs, (len(rows), *base.shape[1:]), place)
        return update._replace(rows=rows)
    if _is_product(update):
        _check_product(update, base.shape, specs, config, place)
    return update._replace(scaling=config.scaling(update.path))


def _is_product(update: Update) -> bool:
    return not update.keys.keys().isdisjoint((*FACTORS, *EMBEDDING))


def _check_shape(key: str, specs: Specs, shape: tuple[int, ...], place: Place) -> None:
    if specs[key].shape != shape:
        expected, found = str(list(shape)), str(list(specs[key].shape))
        raise place.refuse("E_ADAPTER", "the tensor's shape does not fit the base", expected, found, shown(key))


def _rows(key: str, path: str, shape: tuple[int, ...], config: AdapterConfig, place: Place) -> tuple[int, ...]:
    found = [rows for end, rows in config.tokens.items() if path.endswith(end)]
    if len(found) != 1 or not shape or max(found[0], default=0) >= shape[0]:
        what, expected = "trainable_token_indices do not say which rows these are", f"rows of {list(shape)}"
        raise place.refuse("E_ADAPTER", what, expected, shown(found), shown(key))
    return found[0]


def _check_product(update: Update, shape: tuple[int, ...], specs: Specs, config: AdapterConfig, place: Place) -> None:
    """Refuse another rank than the configuration's, whose scaling would be wrong, and magnitudes it does not know."""
    keys, rank = update.keys, config.rank.at(update.path)
    down = keys[FACTORS[0] if FACTORS[0] in keys else EMBEDDING[0]]
    if len(shape) < 2 or (EMBEDDING[0] in keys and len(shape) > 2):
        raise place.refuse("E_ADAPTER", "the base's tensor is no matrix", "a matrix", str(list(shape)), shown(down))
    if specs[down].shape[:1] != (rank,):
        found = f"shape {list(specs[down].shape)}"
        what, remedy = "the rank is not the configuration's", "register it with the adapter_config.json of its training"
        raise place._replace(remedy=remedy).refuse("E_ADAPTER", what, f"rank {rank}", found, shown(down))
    if (MAGNITUDE in keys) != config.dora:
        what, found = (
            "use_dora and the tensors disagree",
            f"{MAGNITUDE} {'present' if MAGNITUDE in keys else 'missing'}",
        )
        raise place.refuse("E_ADAPTER", what, f"use_dora {config.dora}", found, shown(keys.get(MAGNITUDE, down)))


def _check_biases(updates: Mapping[str, Update], config: AdapterConfig, place: Place) -> None:
    """Refuse a bias of lora_B that the configuration does not know, and a missing one where it asks for them."""
    biased = {update.path: update.keys["lora_bias"] for update in updates.values() if "lora_bias" in update.keys}
    factors = {update.path: update.keys["lora_B"] for update in updates.values() if "lora_B" in update.keys}
    for path in sorted(biased.keys() ^ (factors.keys() if config.lora_bias else set())):
        what, found = "lora_bias and the tensors disagree", f"lora_B.bias {'present' if path in biased else 'missing'}"
        key = biased[path] if path in biased else factors[path]
        raise place.refuse("E_ADAPTER", what, f"lora_bias {config.lora_bias}", found, shown(key))


def _oriented(
    updates: Mapping[str, Update], base: Specs, specs: Specs, declared: bool, place: Place
) -> dict[str, Update]:
    """The updates with `turned` as their factors' shapes show it; square matrices follow fan_in_fan_out.

    PEFT decides by the module's class and keeps one flag for all of them, so a flag that other shapes contradict says
    nothing about a square matrix.
    """
    fits = {name: _fits(update, base[name].shape, specs) for name, update in updates.items() if _is_product(update)}
    shown_by_shape = {
        found[0] for name, found in fits.items() if len(found) == 1 and _is_matrix(updates[name], base[name])
    }
    oriented = dict(updates)
    for name, found in fits.items():
        update = updates[name]
        if not found:
            for role, shape in _shapes(update, base[name].shape, specs, False).items():
                _check_shape(update.keys[role], specs, shape, place)
        if len(found) == 2 and shown_by_shape - {declared}:
            what = "it is not clear whether this square matrix is stored as (in, out)"
            expected = f"fan_in_fan_out {not declared}, as the other shapes show"
            raise place.refuse("E_ADAPTER", what, expected, f"{declared}", shown(min(update.keys.values())))
        oriented[name] = update._replace(turned=declared if len(found) == 2 else found[0])
    return oriented


def _is_matrix(update: Update, base: TensorSpec) -> bool:
    return FACTORS[0] in update.keys and len(base.shape) == 2


def _fits(update: Update, shape: tuple[int, ...], specs: Specs) -> list[bool]:
    """The orientations (turned or not) in which every factor has the shape that the base's asks for."""
    ways = (False, True) if FACTORS[0] in update.keys and len(shape) == 2 else (False,)
    wanted = {turned: _shapes(update, shape, specs, turned) for turned in ways}
    return [way for way in ways if all(specs[update.keys[role]].shape == due for role, due in wanted[way].items())]


def _shapes(update: Update, shape: tuple[int, ...], specs: Specs, turned: bool) -> dict[str, tuple[int, ...]]:
    """Role -> the shape that it must have, for a base of `shape`: (out, in, *kernel), (in, out) or (tokens, width)."""
    if EMBEDDING[0] in update.keys:
        rank = specs[update.keys[EMBEDDING[0]]].shape[0]
        due = {EMBEDDING[0]: (rank, *shape[:1]), EMBEDDING[1]: (*shape[1:], rank), MAGNITUDE: shape[1:]}
    else:
        rank = specs[update.keys[FACTORS[0]]].shape[0]
        out, *rest = shape[::-1] if turned else shape
        ones = (1,) * (len(shape) - 2)
        magnitude = (1, out, *ones) if ones else (out,)
        due = {FACTORS[0]: (rank, *rest), FACTORS[1]: (out, rank, *ones), MAGNITUDE: magnitude}
    return {role: wanted for role, wanted in due.items() if role in update.keys}
