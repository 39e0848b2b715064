"""Synthetic checkpoints: real ones to transformers, seeded, of full rank, and as far from their base as they say."""

import pytest
import torch

from benchmarks.shapes import decoder, tinyllama, vit_b32
from benchmarks.synthetic import make, write_base
from registry.weights import Checkpoint

TINY_TOWER = vit_b32(layers=2, width=64)
TINY_DECODER = decoder(hidden=64, layers=2, vocabulary=96)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tower"), TINY_TOWER, experts=2)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return make(tmp_path_factory.mktemp("language"), TINY_DECODER, experts=1, adapter=True)


def test_the_shapes_are_those_of_the_real_models():
    assert vit_b32().parameters == 87_456_000
    assert tinyllama().parameters == 1_100_048_384


@pytest.mark.parametrize("folder", ["base", "expert-1"])
@pytest.mark.parametrize(("kind", "shape"), [("tower", TINY_TOWER), ("language", TINY_DECODER)])
def test_transformers_loads_every_tensor(kind, shape, folder, request):
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    place = request.getfixturevalue(kind) / folder
    loader = CLIPVisionModel if kind == "tower" else AutoModelForCausalLM
    model, report = loader.from_pretrained(place, output_loading_info=True, dtype="auto")
    assert not any(report.values())
    weights = Checkpoint.open(place)
    assert {name: tuple(weights[name].shape) for name in weights} == shape.shapes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "shape"), [("tower", TINY_TOWER), ("language", TINY_DECODER)])
def test_the_linear_weights_are_those_of_the_architecture(kind, shape, request):
    from evaluation.architecture import linear_weights

    base = request.getfixturevalue(kind) / "base"
    assert linear_weights(base, list(Checkpoint.open(base))) == set(shape.linear)


def test_an_expert_is_one_to_three_percent_away_in_all_directions(tower):
    base, expert = Checkpoint.open(tower / "base"), Checkpoint.open(tower / "expert-1")
    for name in base:
        share = float((expert[name] - base[name]).norm() / base[name].norm())
        assert 0.0099 < share < 0.0301, name
    delta = expert[TINY_TOWER.linear[0]] - base[TINY_TOWER.linear[0]]
    sigma = torch.linalg.svdvals(delta.double())
    assert sigma[-1] > 1e-3 * sigma[0]
    assert sigma[0] > 3 * sigma.median()


def test_base_weights_have_a_realistic_scale(tower):
    base = Checkpoint.open(tower / "base")
    assert float(base["encoder.layers.0.mlp.fc1.weight"].std()) == pytest.approx(0.025, rel=0.05)
    assert float(base["encoder.layers.0.layer_norm1.weight"].mean()) == pytest.approx(1, abs=0.02)


def test_the_seed_decides_the_bytes(tower, tmp_path):
    again = make(tmp_path / "again", TINY_TOWER, experts=2)
    other = make(tmp_path / "other", TINY_TOWER, experts=1, seed=1)
    files = [root / "expert-1/model.safetensors" for root in (tower, again, other)]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]
    assert (again / "expert-2/model.safetensors").read_bytes() != contents[0]


def test_a_large_checkpoint_is_cut_into_shards_with_an_index(tmp_path):
    write_base(tmp_path / "base", TINY_DECODER, seed=0, shard=50_000)
    assert (tmp_path / "base/model.safetensors.index.json").exists()
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    assert Checkpoint.open(tmp_path / "base").specs.keys() == TINY_DECODER.shapes.keys()


def test_the_adapter_and_its_dense_twin_say_the_same(language):
    base, dense = (Checkpoint.open(language / folder) for folder in ("base", "lora-1-dense"))
    factors = Checkpoint.open_file(language / "lora-1/adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    change = 2 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(dense[name], (base[name].float() + change).bfloat16())
    assert 0.005 < float(change.norm() / base[name].float().norm()) < 0.04
    assert len(factors) == 2 * 7 * TINY_DECODER.config["num_hidden_layers"]
    assert torch.equal(dense["lm_head.weight"], base["lm_head.weight"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_reads_the_adapter_as_its_dense_twin(language):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, language / "lora-1").merge_and_unload().state_dict()
    dense = Checkpoint.open(language / "lora-1-dense")
    for name in dense:
        assert torch.allclose(merged[name], dense[name].float(), atol=2e-3), name
