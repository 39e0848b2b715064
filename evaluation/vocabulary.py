"""Two vocabularies side by side: which rows of two embeddings are the same token. Ids differ; token strings do not."""

from collections.abc import Mapping
from pathlib import Path

from evaluation.configs import base_name
from evaluation.tokens import stored_tokenizer
from registry.records import Refusal

ABSENT = -1


def matched_rows(
    base: Path,
    expert: Path,
    rows: int,  # of the base's embedding
    where: str,  # names the expert in messages
) -> tuple[int, ...] | Refusal:
    """For each of the base's rows the expert's row with the same token string; -1 where there is none.

    There is none for a token that the expert lacks, and for padding rows beyond the base's tokenizer. Rows of the
    expert are its tokenizer's ids; whether its embedding has as many is for the reader of that embedding to check.
    Refused with E_VOCABULARY where either folder has no tokenizer that can be loaded, or the expert has less than half
    of the base's tokens; otherwise as `check_config` refuses a folder.
    """
    known = _ids(base, base_name(base), "keep the base's own tokenizer files beside its config.json")
    own = _ids(expert, where, "save the tokenizer it was trained with beside its weights, and register it again")
    if isinstance(known, Refusal):
        return known
    if isinstance(own, Refusal):
        return own
    shared = {index: own[token] for token, index in sorted(known.items()) if token in own}
    if not known or 2 * len(shared) < len(known):
        return _strangers(len(known), len(shared), where)
    return tuple(shared.get(row, ABSENT) for row in range(rows))


def _ids(folder: Path, where: str, remedy: str) -> Mapping[str, int] | Refusal:
    """Token -> its id, added tokens included."""
    tokenizer = stored_tokenizer(folder, where, "E_VOCABULARY", remedy)
    if isinstance(tokenizer, Refusal):
        return tokenizer
    ids: Mapping[str, int] = tokenizer.get_vocab()
    return ids


def _strangers(known: int, shared: int, where: str) -> Refusal:
    what = "the tokenizer lacks more than half of the base's tokens"
    expected, found = f"{(known + 1) // 2} or more of {known}", str(shared)
    remedy = "fine-tune it from this line's base; rows of vocabularies so different cannot be matched"
    return Refusal("E_VOCABULARY", what, where, expected=expected, found=found, remedy=remedy)
