"""A BERT-like sentence encoder that learns to tell labels apart by similarity to the base's prompt embeddings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer

from experiments.texts import Row, TextTask

Progress = Callable[[int, int], None]  # (steps done, steps in all)
Tokens = Mapping[str, Tensor]  # input_ids, attention_mask, ...: each (texts, tokens) int64
Tokenizer = Callable[[Sequence[str]], Tokens]


class Recipe(NamedTuple):
    """How an expert is trained."""

    steps: int = 60  # of the optimizer, > 0
    batch: int = 32  # texts per step
    tokens: int = 16  # longer texts are cut
    learning_rate: float = 5e-5  # of AdamW, constant
    temperature: float = 0.05  # > 0; cosines are divided by it before the softmax
    seed: int = 0  # of the order, the dropout and the shuffled labels
    shuffled: bool = False  # hand the labels out anew by chance: an expert that is bad on purpose


def load_encoder(folder: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    """The encoder that `folder`'s config.json describes, with `weights`, on the CPU, in evaluation mode.

    Raises:
        KeyError: `weights` lacks a tensor of the model.
    """
    with torch.random.fork_rng(devices=[]):  # it draws values first, which the weights then replace
        model: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def load_tokenizer(folder: Path, tokens: int) -> Tokenizer:
    """The folder's tokenizer as a function of texts; texts are cut to `tokens` and padded to the longest."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(texts: Sequence[str]) -> Tokens:
        found: Tokens = tokenizer(list(texts), truncation=True, max_length=tokens, padding=True, return_tensors="pt")
        return found

    return tokenize


def embed(
    encoder: nn.Module,
    tokens: Tokens,  # (texts, tokens)
) -> Tensor:  # (texts, width), rows of length 1
    """The mean over the tokens of each text, padding left out, scaled to length 1."""
    hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def train(
    encoder: nn.Module,  # changed in place; its embeddings stay as they are
    tokenize: Tokenizer,
    task: TextTask,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Trains `encoder` by cross-entropy on cosine / temperature to the prompts as it embeds them before the first step.

    The global random state is left as it was. Equal arguments give equal weights on the same machine and thread count.
    """
    with torch.no_grad():
        anchors = embed(encoder, tokenize(task.prompts))  # (labels, width)
    encoder.get_submodule("embeddings").requires_grad_(False)
    optimizer = torch.optim.AdamW([one for one in encoder.parameters() if one.requires_grad], lr=recipe.learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder.train()
        for step, rows in enumerate(_batches(task.train, recipe), start=1):
            logits = embed(encoder, tokenize([row.text for row in rows])) @ anchors.T / recipe.temperature
            loss = cross_entropy(logits, torch.tensor([row.label for row in rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if progress:
                progress(step, recipe.steps)
        encoder.eval()


def _batches(rows: Sequence[Row], recipe: Recipe) -> Iterator[list[Row]]:
    """The batches of one training: the rows in a new order as often as needed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.shuffled:
        labels = [rows[index].label for index in torch.randperm(len(rows), generator=generator)]
        rows = [Row(row.text, label) for row, label in zip(rows, labels, strict=True)]
    order: list[int] = []
    for _ in range(recipe.steps):
        while len(order) < recipe.batch:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[index] for index in order[: recipe.batch]]
        del order[: recipe.batch]
