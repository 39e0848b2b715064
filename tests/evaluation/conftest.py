"""A tiny causal language model that reads letters."""

from types import SimpleNamespace

import pytest

LETTERS = ("<end>", "<unknown>", *"abcdefghijklmnopqrstuvwxyz ")
CONTEXT = 16  # tokens


def make_language_base(folder, bare=True, tied=True, bos="<end>"):
    """A two-layer GPT-2 with random weights; `bare` leaves the output out of the checkpoint."""
    import tokenizers
    import torch
    import transformers
    from safetensors.torch import load_file

    words = tokenizers.models.WordLevel({each: row for row, each in enumerate(LETTERS)}, unk_token="<unknown>")
    letters = tokenizers.Tokenizer(words)
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token=bos, eos_token="<end>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(LETTERS), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():  # larger than at the start of training, so that it has opinions
            parameter.data.mul_(5.0 if parameter.ndim == 2 else 1.0)
    (model.transformer if bare else model).save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    weights = load_file(folder / "model.safetensors")
    return SimpleNamespace(folder=folder, weights=weights, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """The base as the body alone, its output tied to its embedding."""
    return make_language_base(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def language_base():
    """A function that makes such a base otherwise: folder, bare, tied, bos -> folder, weights, model, tokenizer."""
    return make_language_base
