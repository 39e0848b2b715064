"""A zoo that trains in a minute: a small vision transformer on scikit-learn's digits, one expert per view of them.

Merging needs a well-trained base and small updates: with a base that is trained briefly or experts that move far, every
method collapses to chance.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from evaluation.suites import write_suite

LABELS = tuple(str(digit) for digit in range(10))
SHAPE = (1, 8, 8)  # channels, height, width
GATE, TUNE = 600, 197  # images; the other 1000 of 1797 are for training


class Settings(NamedTuple):
    """How the base and the experts are made; the defaults are the ones that were measured."""

    seed: int = 0
    width: int = 128  # of the hidden states, a multiple of 4
    layers: int = 3
    pretraining_steps: int = 800
    pretraining_rate: float = 5e-4  # learning rate of AdamW
    expert_steps: int = 150
    expert_rate: float = 1e-4
    batch: int = 32  # images per step


class Digits(NamedTuple):
    """Images and their labels."""

    images: Tensor  # (images, 1, 8, 8) float32 in [-1, 1]
    labels: Tensor  # (images,) int64 in 0..9


class Splits(NamedTuple):
    """The digits, split once: no image of one split is in another, whatever its view."""

    train: Digits
    tune: Digits
    gate: Digits


def permuted(images: Tensor) -> Tensor:
    """The images, (n, 1, 8, 8), with their 64 pixels in one fixed random order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return images.flatten(1)[:, order].reshape(images.shape)


VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "plain": lambda images: images,
        "rotated": lambda images: images.rot90(1, (2, 3)),
        "flipped": lambda images: images.flip(3),
        "inverted": lambda images: -images,
        "permuted": permuted,
    }
)


def split_digits(seed: int = 0) -> Splits:
    """All 1797 digits, dealt by `seed`: 1000 to train, 197 to tune, 600 to gate."""
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(source.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    gate, tune, train = order.tensor_split((GATE, GATE + TUNE))
    return Splits(*(Digits(images[part], labels[part]) for part in (train, tune, gate)))


def make_zoo(out: Path, settings: Settings | None = None) -> Path:
    """`out` with base/ and experts/<view>/, each as transformers' save_pretrained writes it, and a suite per expert.

    The base is saved without its classifier; each expert has one of its own, which nobody else shares.
    """
    settings = settings or Settings()
    splits = split_digits(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        base = ViTForImageClassification(_config(settings))
        _train(base, splits.train, settings.pretraining_steps, settings.pretraining_rate, settings.batch)
        _save_base(base, out / "base")
        for view in VIEWS:
            make_expert(base, splits, view, out / "experts" / view, settings)
    return out


def make_expert(base: nn.Module, splits: Splits, view: str, out: Path, settings: Settings) -> None:
    """Writes the expert of one view into `out`: a copy of `base`, its classifier fitted first, then all of it."""
    expert = ViTForImageClassification(_config(settings))
    expert.load_state_dict(base.state_dict())
    seen = Splits(*(Digits(VIEWS[view](part.images), part.labels) for part in splits))
    # A classifier that fits the frozen features first keeps the features from moving far (arXiv 2202.10054).
    _fit_head(expert, seen.train)
    _train(expert, seen.train, settings.expert_steps, settings.expert_rate, settings.batch)
    expert.save_pretrained(out)
    _write_suite(out, seen)


def _config(settings: Settings) -> ViTConfig:
    channels, side, _ = SHAPE
    return ViTConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=2 * settings.width,
        image_size=side,
        patch_size=2,
        num_channels=channels,
        num_labels=len(LABELS),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _train(model: nn.Module, digits: Digits, steps: int, rate: float, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for rows in _batches(len(digits.labels), steps, batch):
        loss = cross_entropy(model(pixel_values=digits.images[rows]).logits, digits.labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()


def _batches(images: int, steps: int, batch: int) -> Iterator[Tensor]:
    """Indices of each step's images, (batch,), from torch's global random state."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(images)
        yield order[:batch]
        order = order[batch:]


def _fit_head(model: nn.Module, digits: Digits, steps: int = 200) -> None:
    """Fits the classifier alone to the features of `digits`, (images, width), in full batches."""
    head = model.get_submodule("classifier")
    with torch.no_grad():
        features = model.get_submodule("vit")(pixel_values=digits.images).last_hidden_state[:, 0]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = cross_entropy(head(features), digits.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _save_base(model: nn.Module, out: Path) -> None:
    body = model.get_submodule("vit")
    bare = ViTModel(body.config, add_pooling_layer=False)
    bare.load_state_dict(body.state_dict())
    bare.save_pretrained(out)


def _write_suite(folder: Path, splits: Splits) -> None:
    rows = [
        (image.flatten().tolist(), int(label), split)
        for split, part in (("gate", splits.gate), ("tune", splits.tune))
        for image, label in zip(*part, strict=True)
    ]
    write_suite(folder, kind="image-classification", labels=LABELS, rows=rows, image_shape=SHAPE)
