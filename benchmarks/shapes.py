"""The architectures of the benchmarks: names, shapes and configuration of real models, without their weights.

>>> vit_b32(layers=1).linear[0]
'encoder.layers.0.mlp.fc1.weight'
>>> tinyllama().parameters
1100048384
"""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Architecture(NamedTuple):
    """What a checkpoint of random weights needs to be one that transformers loads."""

    config: Mapping[str, object]  # config.json
    dtype: str  # as safetensors spells it
    shapes: Mapping[str, Shape]  # stored name -> shape, in file order
    linear: tuple[str, ...]  # the weights of nn.Linear modules, sorted
    adapted: tuple[str, ...] = ()  # those of them that a LoRA adapter of this architecture usually covers

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(prod(shape) for shape in self.shapes.values())


def vit_b32(layers: int = 12, width: int = 768) -> Architecture:  # layers > 0; width: a multiple of 64
    """The vision tower of CLIP ViT-B/32, float32: 12 layers of width 768, stored as CLIPVisionModel stores it."""
    inner = 4 * width
    shapes: dict[str, Shape] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 32, 32),
        "embeddings.position_embedding.weight": (50, width),
    }
    linear: dict[str, Shape] = {}
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}"
        linear |= {f"{prefix}.self_attn.{one}_proj.weight": (width, width) for one in ("k", "out", "q", "v")}
        linear |= {f"{prefix}.mlp.fc1.weight": (inner, width), f"{prefix}.mlp.fc2.weight": (width, inner)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}.{norm}.weight": (width,), f"{prefix}.{norm}.bias": (width,)}
    shapes |= linear | {name.removesuffix("weight") + "bias": shape[:1] for name, shape in linear.items()}
    for norm in ("pre_layrnorm", "post_layernorm"):  # the first is spelled so by the model library
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "dtype": "float32",
        **{"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"num_attention_heads": width // 64, "image_size": 224, "patch_size": 32, "projection_dim": 512},
        "hidden_act": "quick_gelu",
    }
    return Architecture(config, "F32", dict(sorted(shapes.items())), tuple(sorted(linear)))


def decoder(
    hidden: int,  # a multiple of 64
    layers: int,
    vocabulary: int,
    intermediate: int | None = None,  # width of the gated MLP; None: 2.75 times hidden, as in TinyLlama
    key_value: int | None = None,  # heads of 64 for keys and values; None: an eighth of the heads, at least one
    dtype: str = "BF16",  # BF16, F16 or F32
) -> Architecture:
    """A Llama decoder with heads of 64 and an output layer of its own, stored as LlamaForCausalLM stores it."""
    heads, inner = hidden // 64, intermediate or 11 * hidden // 4
    groups = key_value or max(1, heads // 8)
    block = {
        **{f"self_attn.{one}_proj": (hidden, hidden) for one in ("q", "o")},
        **{f"self_attn.{one}_proj": (64 * groups, hidden) for one in ("k", "v")},
        **{f"mlp.{one}_proj": (inner, hidden) for one in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    linear: dict[str, Shape] = {"lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        linear |= {f"{prefix}.{one}.weight": shape for one, shape in block.items()}
        shapes |= {f"{prefix}.{one}_layernorm.weight": (hidden,) for one in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        **{"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 64},
        **{"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary},
        **{"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        **{"bos_token_id": 1, "eos_token_id": 2},
    }
    adapted = tuple(sorted(linear.keys() - {"lm_head.weight"}))
    return Architecture(config, dtype, dict(sorted((shapes | linear).items())), tuple(sorted(linear)), adapted)


def tinyllama(layers: int = 22) -> Architecture:  # layers > 0
    """The 1.1 billion parameter shape of TinyLlama, bfloat16."""
    return decoder(hidden=2048, layers=layers, vocabulary=32000, intermediate=5632, key_value=4)


def llama_7b(layers: int = 32) -> Architecture:  # layers > 0
    """The 6.7 billion parameter shape of Llama 7B, bfloat16; its 32 heads of 128 are written as 64 heads of 64."""
    return decoder(hidden=4096, layers=layers, vocabulary=32000, intermediate=11008, key_value=64)
