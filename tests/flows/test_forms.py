"""Every form of checkpoint, folded by the engine and compared with a plain fold in memory, tensor by tensor.

What `merging.merge` does too must agree to the last bit, because the arithmetic is the same code; the rest (slices of
stacks, statistics of batch norms, buffers, ties) is worked out here by hand.
"""

import json
import math
import re
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merging import merge
from registry.records import FoldinError

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 16}
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
LLAMA = {**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
MIXTURE = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 16, "tie_word_embeddings": False}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 0}
GPT2 = {**GPT2, "eos_token_id": 0}
CLIP = {"text_config": {**LLAMA, "projection_dim": 16}, "vision_config": IMAGE, "projection_dim": 16}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
EXPERTS = 3
NOTHING = r"\Z."  # a pattern that matches no name


class Form(NamedTuple):
    model: str
    options: dict
    matrices: str  # pattern of the stored names of what is projected
    count: int  # how many that are
    stacks: str = NOTHING  # pattern of those of them that hold a matrix per index
    dtype: torch.dtype = torch.float32
    shard: str = ""  # the most that save_pretrained puts into one file
    project: tuple = ()  # patterns of the line


FORMS = {
    "BERT": Form("BertModel", TEXT, r"(query|key|value|dense)\.weight", 7),
    "GPT-2": Form("GPT2LMHeadModel", GPT2, r"(c_attn|c_proj|c_fc)\.weight", 4),
    "Llama, tied": Form("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, r"_proj\.weight", 7),
    "Llama, untied, bf16 in shards": Form(
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": False},
        r"(_proj|lm_head)\.weight",
        8,
        dtype=torch.bfloat16,
        shard="8KB",
    ),
    "Llama, fp16": Form(
        "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, r"_proj\.weight", 7, dtype=torch.float16
    ),
    "ViT": Form("ViTModel", IMAGE, r"(query|key|value|dense)\.weight", 7),
    "ViT, patches projected": Form(
        "ViTModel", IMAGE, r"(query|key|value|dense|projection)\.weight", 8, project=("*patch_embeddings*",)
    ),
    "CLIP": Form("CLIPModel", CLIP, r"(_proj|fc\d|_projection)\.weight", 2 * 6 + 2),
    "T5": Form("T5ForConditionalGeneration", T5, r"\.(q|k|v|o|wi|wo)\.weight", 16),
    "Mixtral": Form("MixtralForCausalLM", MIXTURE, r"(_proj|lm_head|gate|w\d)\.weight", 4 + 1 + 1 + 9),
    "GPT-OSS, experts fused": Form(
        "GptOssForCausalLM",
        MIXTURE,
        r"(_proj|lm_head|router)\.weight|experts\.\w+_proj$",
        4 + 1 + 1 + 2,
        r"experts\.\w+_proj$",
    ),
    "ResNet": Form("ResNetModel", RESNET, NOTHING, 0),
    "ResNet, convolutions projected": Form(
        "ResNetModel", RESNET, r"convolution\.weight", 6, project=("*convolution.weight",)
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """As the engine computes a tensor; other numbers of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def model_of(form):
    torch.manual_seed(0)
    cls = getattr(transformers, form.model)
    return cls(cls.config_class(**form.options)).to(form.dtype)


def train(model, seed):
    """Stands for fine-tuning: everything moves, but not what has one axis in the second expert."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if seed != 2 or parameter.ndim != 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.02 * noise).to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
            if name.endswith("num_batches_tracked"):
                buffer.add_(seed)


def written(root, form):
    """The folders of a base and its experts, as transformers writes them."""
    folders = [root / "base", *(root / f"expert-{seed}" for seed in range(1, EXPERTS + 1))]
    for seed, folder in enumerate(folders):
        model = model_of(form)
        if seed:
            train(model, seed)
        model.save_pretrained(folder, max_shard_size=form.shard or "1GB")
    return folders


def tensors_in(folder):
    """All tensors of a checkpoint, read past the engine."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def shards_in(folder):
    """File name -> its tensors' names, dtypes and shapes."""
    return {
        path.name: {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(path).items()}
        for path in folder.glob("*.safetensors")
    }


def sliced(tensors, stacks):
    """Each matrix of a stack under a name of its own."""
    flat = {}
    for name, tensor in tensors.items():
        parts = {f"{name}[{at}]": each for at, each in enumerate(tensor)} if re.search(stacks, name) else {name: tensor}
        flat.update(parts)
    return flat


def is_statistic(name):
    return name.endswith(("running_mean", "running_var"))


def mean_statistics(base, experts):
    """Running means and variances of a mixture of all experts' data in equal parts: the law of total variance."""
    found = {}
    for name in base:
        if name.endswith("running_mean"):
            spread = name.replace("running_mean", "running_var")
            means = torch.stack([expert[name].double() for expert in experts])
            variances = torch.stack([expert[spread].double() for expert in experts])
            found[name] = means.mean(0)
            found[spread] = variances.mean(0) + (means - means.mean(0)).square().mean(0)
    return found


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def fold_one_by_one(line, experts):
    """All passes of a line, one expert each."""
    for expert in experts:
        done = line.fold(expert)
    return done


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_form_is_folded_as_in_memory(tmp_path, bare_line, form):
    base_folder, *folders = written(tmp_path, form)
    line = bare_line(base_folder, project=form.project)
    done = fold_one_by_one(line, folders)
    serving, served = line.serve(done.plan)
    base, found = tensors_in(base_folder), tensors_in(serving)
    experts = [tensors_in(folder) for folder in folders]
    projected = {name for name in base if re.search(form.matrices, name)}
    assert done.plan.kinds.projected == projected
    assert len(projected) == form.count

    first, *rest = (sliced({n: each[n] for n in each if not is_statistic(n)}, form.stacks) for each in (base, *experts))
    wanted = merge(first, rest, "opcm", projected=sliced({name: base[name] for name in projected}, form.stacks))
    statistics = mean_statistics(base, experts)
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        if name in statistics:
            # The engine keeps means and mean squares in float32, relative to the base's.
            torch.testing.assert_close(found[name].double(), statistics[name], rtol=1e-5, atol=1e-6, msg=name)
        elif re.search(form.stacks, name):
            # The matrices' norms are summed one by one here, so the scale of the total may round otherwise.
            slices = torch.stack([wanted[f"{name}[{at}]"] for at in range(len(tensor))])
            torch.testing.assert_close(found[name], slices, rtol=1e-6, atol=1e-8, msg=name)
        elif form.stacks == NOTHING:
            assert torch.equal(found[name], wanted[name]), name
        else:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)
        assert torch.equal(found[name], tensor) is not tensor.is_floating_point(), name
    assert shards_in(serving) == shards_in(base_folder)
    check_loads(form, serving, base_folder)
    check_sums(line, base, experts, served, found)


def check_loads(form, serving, base_folder):
    """transformers finds every tensor in the serving checkpoint, in shards where the base has shards."""
    index = "model.safetensors.index.json"
    assert (serving / index).exists() is (base_folder / index).exists() is bool(form.shard)
    if form.shard:
        maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (serving, base_folder)]
        assert maps[0] == maps[1]
        assert len(set(maps[0].values())) > 2
    cls = getattr(transformers, form.model)
    model, info = cls.from_pretrained(serving, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert next(model.parameters()).dtype == form.dtype
    transformers.AutoModel.from_pretrained(serving)


def check_sums(line, base, experts, served, found):
    """The line's statistics and the loss of the cast, from the files alone."""
    counted = [name for name, tensor in base.items() if tensor.is_floating_point() and not is_statistic(name)]
    norms = [norm(expert[name].double() - base[name].double() for name in counted) for expert in experts]
    totals = {name: line.slots[f"{name}:total"] for name in counted}
    assert line.stats == pytest.approx((EXPERTS, sum(norms), norm(totals.values())), rel=1e-6)
    count, norm_sum, total_norm = line.stats
    updates = {name: total * (norm_sum / (count * total_norm)) for name, total in totals.items()}
    lost = norm(base[name].float() + update - found[name].float() for name, update in updates.items())
    assert served.cast_loss == pytest.approx(lost / norm(updates.values()), rel=1e-3)
    assert (served.cast_loss == 0) is (base[counted[0]].dtype == torch.float32)


def edit(folder, change):
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_tied_weight_stored_twice_is_folded_once_counted_once_and_written_equal(tmp_path, bare_line):
    form = FORMS["Llama, tied"]._replace(dtype=torch.bfloat16)  # so that the cast loses something
    base, *experts = written(tmp_path, form)
    once = bare_line(base)
    expected, plain = once.serve(fold_one_by_one(once, experts).plan)
    tokens, head = "model.embed_tokens.weight", "lm_head.weight"
    for folder in (base, *experts):
        edit(folder, lambda tensors: tensors.update({head: tensors[tokens].clone()}))
    twice = bare_line(base)
    done = fold_one_by_one(twice, experts)
    serving, served = twice.serve(done.plan)
    found = tensors_in(serving)
    assert found.keys() - tensors_in(expected).keys() == {head}
    assert torch.equal(found[head], found[tokens])
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors_in(expected).items())
    assert twice.stats == once.stats
    assert served.cast_loss == plain.cast_loss > 0
    assert head not in done.plan.names
    assert f"{head}:total" not in twice.slots


def test_names_that_are_tied_in_name_only_are_two_tensors(tmp_path, bare_line):
    base, *experts = written(tmp_path, FORMS["Llama, tied"])
    tokens, head = "model.embed_tokens.weight", "lm_head.weight"
    for seed, folder in enumerate((base, *experts)):
        edit(folder, lambda tensors, seed=seed: tensors.update({head: tensors[tokens] + 1 + seed}))
    line = bare_line(base)
    done = fold_one_by_one(line, experts)
    found = tensors_in(line.serve(done.plan)[0])
    stored = tensors_in(base)
    wanted = merge(
        stored, map(tensors_in, experts), "opcm", projected=[n for n in stored if n.endswith("_proj.weight")]
    )
    assert torch.equal(found[head], wanted[head])
    assert not torch.equal(found[head], found[tokens])


def test_buffers_stay_the_bases(tmp_path, bare_line):
    bert, *experts = written(tmp_path / "bert", FORMS["BERT"])
    positions = torch.arange(16)[None]
    for seed, folder in enumerate((bert, *experts)):
        edit(folder, lambda tensors, seed=seed: tensors.update({"embeddings.position_ids": positions + seed}))
    line = bare_line(bert)
    done = fold_one_by_one(line, experts)
    assert torch.equal(tensors_in(line.serve(done.plan)[0])["embeddings.position_ids"], positions)

    llama, *experts = written(tmp_path / "llama", FORMS["Llama, tied"])
    plain = bare_line(llama)
    fold_one_by_one(plain, experts)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for seed, folder in enumerate((llama, *experts)):
        edit(folder, lambda tensors, seed=seed: tensors.update({name: torch.full((8,), 1.0 + seed)}))
    line = bare_line(llama)
    done = fold_one_by_one(line, experts)
    assert torch.equal(tensors_in(line.serve(done.plan)[0])[name], torch.ones(8))
    assert line.stats == plain.stats
    assert name not in done.plan.names


def test_a_matrix_that_the_line_calls_plain_is_added_plainly(tmp_path, bare_line):
    base, *experts = written(tmp_path, FORMS["BERT"])
    line = bare_line(base, plain=("*",))
    done = fold_one_by_one(line, experts)
    found, stored = tensors_in(line.serve(done.plan)[0]), tensors_in(base)
    matrix = "encoder.layer.0.output.dense.weight"
    wanted = merge(stored, map(tensors_in, experts), "opcm", projected=[])
    other = merge(stored, map(tensors_in, experts), "opcm", projected=[matrix])
    assert all(torch.equal(found[name], wanted[name]) for name in stored)
    assert not torch.allclose(found[matrix], other[matrix], rtol=1e-3)


def test_the_merged_statistics_are_those_of_the_mixture(tmp_path, bare_line):
    """Where one expert saw other data, the variance between the means counts."""
    base, *experts = written(tmp_path, FORMS["ResNet"])
    mean, variance = (f"embedder.embedder.normalization.running_{each}" for each in ("mean", "var"))
    for number, folder in enumerate(experts):
        sample = torch.full((8,), float(number)), torch.full((8,), 2.0)
        edit(folder, lambda tensors, sample=sample: tensors.update(dict(zip((mean, variance), sample, strict=True))))
    line = bare_line(base)
    found = tensors_in(line.serve(fold_one_by_one(line, experts).plan)[0])
    torch.testing.assert_close(found[mean], torch.full((8,), 1.0))  # of 0, 1 and 2
    torch.testing.assert_close(found[variance], torch.full((8,), 2.0 + 2 / 3))


@pytest.mark.parametrize("lacks", [False, True], ids=["kept", "left out"])
def test_an_expert_that_moved_means_alone_widens_the_variance(tmp_path, bare_line, lacks):
    """The mean square moves with the mean, also where the expert's variance is the base's or is not there."""
    base, *experts = written(tmp_path, FORMS["ResNet"])
    mean, variance = (f"embedder.embedder.normalization.running_{each}" for each in ("mean", "var"))
    stored = tensors_in(base)
    for number, folder in enumerate(experts):
        moved = {**stored, mean: torch.full((8,), float(number))}
        if lacks:
            del moved[variance]
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
    apart, together = bare_line(base), bare_line(base)
    done = fold_one_by_one(apart, experts)
    found = tensors_in(apart.serve(done.plan)[0])
    torch.testing.assert_close(found[mean], torch.full((8,), 1.0))
    torch.testing.assert_close(found[variance], stored[variance] + 2 / 3)
    assert together.fold(*experts).bytes == done.bytes


NORM = "embedder.embedder.normalization.running_"


def with_statistics(folder, dtype, mean, variance):
    """The checkpoint in another dtype, with one batch norm's statistics set."""

    def change(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()})
        tensors[f"{NORM}mean"] = torch.full((8,), mean, dtype=dtype)
        tensors[f"{NORM}var"] = torch.full((8,), variance, dtype=dtype)

    edit(folder, change)


@pytest.mark.parametrize(("dtype", "mean", "apart"), [(torch.float32, 2.0**20, 1.0), (torch.bfloat16, 8192.0, 0.0)])
def test_a_small_variance_beside_a_large_mean_is_not_lost(tmp_path, bare_line, dtype, mean, apart):
    """mean^2 is 10^12 times the variance here: of their sum float32 would keep no digit."""
    base, *experts = written(tmp_path, FORMS["ResNet"])
    means = (mean, mean - apart, mean, mean + apart)
    for folder, one, variance in zip((base, *experts), means, (0.5, 0.2, 0.5, 1.7), strict=True):
        with_statistics(folder, dtype, one, variance)
    line = bare_line(base)
    found = tensors_in(line.serve(fold_one_by_one(line, experts).plan)[0])
    assert torch.equal(found[f"{NORM}mean"], torch.full((8,), mean, dtype=dtype))
    torch.testing.assert_close(found[f"{NORM}var"], torch.full((8,), 0.8 + apart * 2 / 3, dtype=dtype))


def test_a_merged_variance_beyond_its_dtype_is_refused_by_name(tmp_path, bare_line):
    base, *experts = written(tmp_path, FORMS["ResNet"])
    for folder, mean in zip((base, *experts), (0.0, 0.0, 1000.0, -1000.0), strict=True):
        with_statistics(folder, torch.float16, mean, 1.0)
    line = bare_line(base)
    done = fold_one_by_one(line, experts)
    with pytest.raises(FoldinError, match="the merged tensor is not finite") as caught:
        line.serve(done.plan)
    assert (caught.value.refusal.code, caught.value.refusal.tensor) == ("E_FOLD", f"{NORM}var")


def test_statistics_that_nobody_moved_stay_the_bases_to_the_bit(tmp_path, bare_line):
    base, *experts = written(tmp_path, FORMS["ResNet"])
    stored = tensors_in(base)
    still = {name: tensor for name, tensor in stored.items() if is_statistic(name)}
    still |= {f"{NORM}mean": torch.full((8,), 0.1), f"{NORM}var": torch.full((8,), 0.3)}
    for folder in (base, *experts):
        edit(folder, lambda tensors: tensors.update(still))
    line = bare_line(base)
    found = tensors_in(line.serve(fold_one_by_one(line, experts).plan)[0])
    assert all(torch.equal(found[name], tensor) for name, tensor in still.items())
    assert not torch.equal(
        found["embedder.embedder.convolution.weight"], stored["embedder.embedder.convolution.weight"]
    )


def test_a_tied_weight_stored_in_two_dtypes_is_two_tensors(tmp_path, bare_line):
    """Equal values of other dtypes could not both be written from one folded tensor."""
    base, *experts = written(tmp_path, FORMS["Llama, tied"])
    tokens, head = "model.embed_tokens.weight", "lm_head.weight"
    for folder in (base, *experts):
        edit(folder, lambda tensors: tensors.update({tokens: tensors[tokens].bfloat16().float()}))
        edit(folder, lambda tensors: tensors.update({head: tensors[tokens].bfloat16()}))
    line = bare_line(base)
    done = fold_one_by_one(line, experts)
    found = tensors_in(line.serve(done.plan)[0])
    assert {tokens, head} <= set(done.plan.names)
    assert (found[tokens].dtype, found[head].dtype) == (torch.float32, torch.bfloat16)
    stored, moved = tensors_in(base), [tensors_in(folder) for folder in experts]
    wanted = merge(stored, moved, "opcm", projected=[name for name in stored if name.endswith("_proj.weight")])
    assert torch.equal(found[tokens], wanted[tokens])
    assert torch.equal(found[head], wanted[head])
