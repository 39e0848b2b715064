"""Texts as the tokens of a model, each made once: models take them padded, and what they cost is known before."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import transformers
from torch import Tensor

from evaluation.configs import VOCABULARIES, base_name, vocabulary_files
from evaluation.escape import clean
from evaluation.models import Untyped, check_config, configuration
from registry.records import SYSTEM_ERRORS, FoldinError, Refusal

LONGEST = 128  # tokens of a text that is classified; suites hold short texts
CONTEXT = 1024  # tokens that a language model reads at once, at most

Tokens = dict[str, list[int]]  # what the model takes of one text: input_ids, attention_mask, ...


class Tokenizer(NamedTuple):
    """What turns texts into what a text model takes; a text is cut after LONGEST tokens."""

    tokens: Callable[[Sequence[str]], list[Tokens]]
    padded: Callable[[Sequence[Tokens]], dict[str, Tensor]]  # n texts -> tensors (n, tokens), padded to the longest


def tokenizer_of(folder: Path) -> Tokenizer:
    """The folder's tokenizer. Raises FoldinError (E_CONFIG) when there is none."""
    config, tokenizer = configuration(folder), loaded_tokenizer(folder)
    if tokenizer.pad_token is None:  # GPT-2 has none; the attention mask hides what stands there
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", LONGEST), LONGEST)

    def tokens(texts: Sequence[str]) -> list[Tokens]:
        found = tokenizer(list(texts), truncation=True, max_length=longest)
        return [{name: rows[row] for name, rows in found.items()} for row in range(len(texts))]

    def padded(rows: Sequence[Tokens]) -> dict[str, Tensor]:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return dict(tokenizer.pad(columns, return_tensors="pt"))

    return Tokenizer(tokens, padded)


def context_of(folder: Path, tokenizer: Untyped) -> int:
    """How many tokens a language model of this configuration reads at once, at most CONTEXT."""
    known = getattr(configuration(folder), "max_position_embeddings", None) or CONTEXT
    return int(min(tokenizer.model_max_length, known, CONTEXT))


def loaded_tokenizer(folder: Path) -> Untyped:
    """The tokenizer of transformers made from the base's files. Raises FoldinError (E_CONFIG) when there is none."""
    tokenizer = stored_tokenizer(folder, base_name(folder))
    if isinstance(tokenizer, Refusal):
        raise FoldinError(tokenizer)
    return tokenizer


def stored_tokenizer(folder: Path, where: str, code: str = "E_CONFIG", remedy: str = "") -> Untyped | Refusal:
    """The tokenizer of transformers made from the folder's files.

    Refused as `check_config` refuses the folder, and with `code` where the files are missing or cannot be loaded.
    """
    problem = check_config(folder, where)
    if problem:
        return problem
    # Without its files transformers makes a tokenizer that knows no word.
    if not vocabulary_files(folder):
        expected = " or ".join(VOCABULARIES)
        return Refusal(code, "the tokenizer is missing", where, expected=expected, remedy=remedy)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        return Refusal(code, "the tokenizer cannot be loaded", where, found=clean(str(error)), remedy=remedy)
