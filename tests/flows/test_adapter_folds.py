"""LoRA adapters through the engine: kept as factors while that is small, the same model as their dense forms give."""

import warnings
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flows.fitting import Refusal
from flows.plan import LEFT, RIGHT
from registry.adapters import Adapter
from registry.files import hash_tree
from registry.weights import Checkpoint

SIZES = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA = {**SIZES, "vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
QUERY, UP, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
ADAPTED = {
    f"model.layers.0.{module}.weight"
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
}


class Zoo(NamedTuple):
    base: object
    adapters: list
    dense: list  # the same experts, merged by PEFT and saved whole
    full: object  # an expert that was trained whole


def new_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False))


def save(model, folder):
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return folder


def adapted(base, folder, seed, **config):
    """The folder of an adapter that moved every trainable parameter, and PEFT's own merge of it."""
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned = get_peft_model(model, LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 8, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        tuned.save_pretrained(folder / "adapter")
        save(tuned.merge_and_unload(), folder / "dense")
    return folder / "adapter", folder / "dense"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = save(new_model(), root / "base")
    pairs = [adapted(base, root / f"expert-{seed}", seed) for seed in (1, 2, 3, 4)]
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    return Zoo(base, [adapter for adapter, _ in pairs], [dense for _, dense in pairs], save(model, root / "full"))


def densify(base, adapter, folder):
    """The adapter as a full checkpoint, computed from its factors as the engine reads them."""
    weights = Checkpoint.open(base, "base")
    found = Adapter.open(adapter, weights)
    folder.mkdir(parents=True)
    for path in base.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(
        {**{name: weights[name] for name in weights}, **dict(found)}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def close(one, other, base):
    """Whether the updates of two models agree to 1e-5 of their norm, tensor by tensor."""
    for name, start in base.items():
        first, second = one[name].double() - start.double(), other[name].double() - start.double()
        scale = float(second.norm())
        # What float32 storage of base + update rounds away is no part of the comparison.
        rounding = float(start.abs().max()) * 2**-24 * start.numel() ** 0.5
        assert float((first - second).norm()) <= 1e-5 * scale + 2 * rounding, name


def serve(*lines):
    """The serving tensors of lines after these passes: (line, its last pass), ..."""
    return [load_file(line.serve(last.plan)[0] / "model.safetensors") for line, last in lines]


def total(line, name):
    """The total of one tensor, dense."""
    if f"{name}:total" in line.slots:
        return line.slots[f"{name}:total"].double()
    return line.slots[f"{name}:total.{LEFT}"].double() @ line.slots[f"{name}:total.{RIGHT}"].double().T


@pytest.mark.parametrize("method", ["opcm", "average", "task_arithmetic"])
def test_adapters_give_the_model_that_their_dense_forms_give(zoo, bare_line, tmp_path, method):
    factors, matrices = bare_line(zoo.base, method=method), bare_line(zoo.base, method=method)
    for number, adapter in enumerate(zoo.adapters[:3]):
        done = factors.fold(adapter)
        reference = matrices.fold(densify(zoo.base, adapter, tmp_path / f"dense-{number}"))
        assert set(done.plan.names) == ADAPTED == set(reference.plan.names)
        for name in ADAPTED:
            wanted = total(matrices, name)
            assert float((total(factors, name) - wanted).norm() / wanted.norm()) < 1e-5, name
            for mine, other in zip(done.measures[0][name], reference.measures[0][name], strict=True):
                assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
        assert factors.stats == pytest.approx(matrices.stats, rel=1e-5)
    served = serve((factors, done), (matrices, reference))
    close(*served, load_file(zoo.base / "model.safetensors"))


def test_adapters_give_what_folding_peft_s_own_merges_gives(zoo, bare_line):
    one, other = bare_line(zoo.base, method="average"), bare_line(zoo.base, method="average")
    first, second = one.fold(*zoo.adapters[:3]), other.fold(*zoo.dense[:3])
    served = serve((one, first), (other, second))
    close(*served, load_file(zoo.base / "model.safetensors"))


def test_the_state_of_adapters_is_their_factors(zoo, bare_line):
    line = bare_line(zoo.base)
    for number, adapter in enumerate(zoo.adapters[:3], 1):
        line.fold(adapter)
        assert set(line.slots) == {f"{name}:total.{side}" for name in ADAPTED for side in (LEFT, RIGHT)}
        shapes = [line.slots.stored[f"{UP}:total.{side}"].spec.shape for side in (LEFT, RIGHT)]
        assert shapes == [(64, 4 * number), (48, 4 * number)]
        assert {place.spec.dtype for place in line.slots.stored.values()} == {"F32"}


def test_a_rank_beyond_half_the_short_side_is_kept_as_a_matrix(zoo, bare_line, tmp_path):
    line, whole = bare_line(zoo.base), bare_line(zoo.base)
    wide = [adapted(zoo.base, tmp_path / f"wide-{seed}", seed, r=12)[0] for seed in (11, 12, 13)]
    keys = []
    for number, adapter in enumerate(wide):
        line.fold(adapter)
        whole.fold(densify(zoo.base, adapter, tmp_path / f"dense-{number}"))
        keys.append(sorted(key.removeprefix(QUERY) for key in line.slots if key.startswith(QUERY)))
    assert keys == [[":total.left", ":total.right"]] * 2 + [[":total"]]  # ranks 12, 24 = 48 / 2, 36
    for name in ADAPTED:
        wanted = total(whole, name)
        assert float((total(line, name) - wanted).norm() / wanted.norm()) < 1e-5, name
    line.fold(zoo.adapters[0])
    assert f"{QUERY}:total" in line.slots


def test_a_dense_expert_after_adapters_makes_the_total_dense(zoo, bare_line, tmp_path):
    line, whole = bare_line(zoo.base), bare_line(zoo.base)
    line.fold(zoo.adapters[0])
    whole.fold(densify(zoo.base, zoo.adapters[0], tmp_path / "dense"))
    mixed, reference = line.fold(zoo.full), whole.fold(zoo.full)
    assert set(line.slots) == {f"{name}:total" for name in load_file(zoo.base / "model.safetensors")}
    served = serve((line, mixed), (whole, reference))
    close(*served, load_file(zoo.base / "model.safetensors"))


def test_a_mixed_batch_is_byte_for_byte_one_pass_each(zoo, bare_line):
    batch = [zoo.adapters[0], zoo.adapters[1], zoo.full, zoo.adapters[2]]
    together, apart = bare_line(zoo.base), bare_line(zoo.base)
    done = together.fold(*batch)
    alone = [apart.fold(expert) for expert in batch]
    assert done.bytes == alone[-1].bytes
    assert together.stats == apart.stats
    assert together.stored == apart.stored
    for batched, one in zip(done.measures, (each.measures[0] for each in alone), strict=True):
        assert {name: found for name, found in batched.items() if any(found)} == {
            name: found for name, found in one.items() if any(found)
        }
    assert hash_tree(together.serve(done.plan)[0]) == hash_tree(apart.serve(alone[-1].plan)[0])


def test_a_batch_of_adapters_alone_is_byte_for_byte_one_pass_each(zoo, bare_line):
    together, apart = bare_line(zoo.base), bare_line(zoo.base)
    done = together.fold(*zoo.adapters)
    alone = [apart.fold(expert) for expert in zoo.adapters]
    assert any(key.endswith(LEFT) for key in together.slots)
    assert done.bytes == alone[-1].bytes
    assert together.stats == apart.stats


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte_of_factors(zoo, bare_line, monkeypatch, workers):
    from flows import parts

    monkeypatch.setattr(parts, "PART_BYTES", 1024)
    lines = [bare_line(zoo.base, devices=("cpu",) * number) for number in (1, workers)]
    done = [line.fold(*zoo.adapters[:2]) for line in lines]
    assert len(done[0].bytes) > 2
    assert done[0].bytes == done[1].bytes


def test_parts_of_one_pass_count_the_serving_weights_that_they_hold(zoo, bare_line, monkeypatch):
    """The factors are small, and the weights that a part makes of them are not."""
    from flows import parts

    monkeypatch.setattr(parts, "PART_BYTES", 8 * 1024)
    for method, few in (("average", False), ("opcm", True)):
        plan = bare_line(zoo.base, method=method).plan(zoo.adapters[0])
        written = [sum(plan.base.stored[name].bytes for name in part.names) for part in parts.state_parts(plan)]
        assert plan.one_pass is not few
        assert (max(written) > 16 * 1024) is few


def test_only_what_is_read_is_read_ahead(zoo, bare_line, monkeypatch):
    """Factors need no base; what is kept of them is asked for by its own names."""
    line, asked = bare_line(zoo.base), []
    line.fold(zoo.adapters[0])
    monkeypatch.setattr(Checkpoint, "expect", lambda self, name: asked.append((self.where, name)))
    line.fold(zoo.adapters[1])
    assert set(asked) == {("state", f"{name}:total.{side}") for name in ADAPTED for side in (LEFT, RIGHT)}


def test_magmax_keeps_adapters_as_matrices(zoo, bare_line, tmp_path):
    line, whole = bare_line(zoo.base, method="magmax"), bare_line(zoo.base, method="magmax")
    for number, adapter in enumerate(zoo.adapters[:2]):
        line.fold(adapter)
        whole.fold(densify(zoo.base, adapter, tmp_path / f"dense-{number}"))
    assert set(line.slots) == {f"{name}:total" for name in ADAPTED}
    assert all(torch.equal(line.slots[key], whole.slots[key]) for key in line.slots)


def test_what_is_no_product_of_factors_is_folded_dense(zoo, bare_line, tmp_path):
    """DoRA's update depends on the base's norms; an output layer trained whole is a tensor like any other."""
    adapter, merged = adapted(zoo.base, tmp_path / "dora", 21, use_dora=True, modules_to_save=["lm_head"])
    line, whole = bare_line(zoo.base, method="average"), bare_line(zoo.base, method="average")
    done, reference = line.fold(adapter), whole.fold(merged)
    assert set(line.slots) == {f"{name}:total" for name in {*ADAPTED, HEAD}} == set(whole.slots)
    served = serve((line, done), (whole, reference))
    close(*served, load_file(zoo.base / "model.safetensors"))


@pytest.mark.parametrize(("saved", "noted"), [(torch.bfloat16, {HEAD: "BF16"}), (torch.float32, {})])
def test_a_layer_that_an_adapter_brought_whole_carries_the_rounding_of_its_own_dtype(
    zoo, bare_line, tmp_path, saved, noted
):
    """Nothing else that an adapter does is rounded to the dtype of any weights."""
    adapter, _ = adapted(zoo.base, tmp_path / "whole", 22, modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: each.to(saved) for name, each in tensors.items()}, adapter / "adapter_model.safetensors")
    assert bare_line(zoo.base).fold(adapter).plan.stored == (noted,)


def test_a_matrix_that_only_adapters_moved_carries_no_rounding_of_a_coarse_base(zoo, bare_line, tmp_path):
    """Also where other experts, who left it alone, came before."""
    base, first = tmp_path / "base", tmp_path / "first"
    for folder, names in ((base, ()), (first, (UP,))):
        save(new_model().bfloat16(), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: tensors[name] * 1.5 for name in names}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    line = bare_line(base)
    assert line.fold(first).plan.stored == ({},)  # as coarse as the base
    done = line.fold(zoo.adapters[0])
    assert set(done.plan.names) == ADAPTED
    assert done.plan.stored == (dict.fromkeys(ADAPTED - {UP}, "F32"),)


def test_factors_that_the_next_expert_left_alone_are_not_touched(zoo, bare_line, tmp_path):
    """Not even by the rounding of another decomposition."""
    alone, _ = adapted(zoo.base, tmp_path / "alone", 23, target_modules=["up_proj"])
    line = bare_line(zoo.base)
    line.fold(zoo.adapters[0])
    before = {key: line.slots[key] for key in line.slots}
    line.fold(alone)
    for side in (LEFT, RIGHT):
        assert torch.equal(line.slots[f"{QUERY}:total.{side}"], before[f"{QUERY}:total.{side}"])
        assert line.slots[f"{UP}:total.{side}"].shape[1] > before[f"{UP}:total.{side}"].shape[1]


def test_an_adapter_of_one_of_two_tied_tensors_is_refused(bare_line, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False))
    untied = save(model, tmp_path / "untied")
    adapter, _ = adapted(untied, tmp_path / "head", 3, target_modules=["lm_head"])
    tied = save(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)), tmp_path / "tied"
    )
    tensors = load_file(tied / "model.safetensors")
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    found = bare_line(tied).fit(adapter)
    assert isinstance(found, Refusal)
    assert (found.code, found.tensor) == ("E_ADAPTER", HEAD)
