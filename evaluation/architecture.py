"""What each tensor of a checkpoint is to its architecture, told from config.json alone: nothing is loaded or run.

"Stored" names are those inside a checkpoint, "running" ones those of transformers' model. One running tensor may be
stored as many (the experts of Mixtral), under another name, or with or without an outer prefix.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from evaluation.models import own_prefix, skeleton

Untyped = Any  # models of transformers, which mypy does not see
Tensors = Mapping[str, Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FREQUENCIES = "inv_freq"  # of rotary embeddings; a few architectures store them though they compute them
MEAN, VARIANCE = "running_mean", "running_var"


@dataclass(frozen=True)
class Anatomy:
    """What the tensors of a checkpoint are to its architecture, by stored name. A tensor may be of several kinds."""

    linear: frozenset[str]  # (out, in): weights of linear layers, a mixture's routers and singly stored experts too
    transposed: frozenset[str]  # (in, out): those of `linear` that are stored so (GPT-2's Conv1D)
    stacked: frozenset[str]  # (experts, ·, ·): one linear weight per leading index, either way round
    convolutions: frozenset[str]  # (out, in, ...): weights of ungrouped convolutions; depthwise ones are not in it
    vocabulary: frozenset[str]  # (tokens, ...): one row or entry per token: embeddings, output heads, their biases
    means: Mapping[str, str]  # running mean of a batch norm -> the running variance beside it
    derived: frozenset[str]  # buffers that the model computes itself, where the checkpoint stores them (inv_freq)
    aliases: Mapping[
        str, str
    ]  # tied weights: another name of a tensor -> its stored name; such names need not be stored


def anatomy(folder: Path, names: Iterable[str] | None = None) -> Anatomy:
    """The anatomy of the architecture in `folder`, which is built on the meta device.

    With `names`, those of a checkpoint, its tensors as it spells them: with or without the outer prefix, as
    `save_pretrained` writes them or as the model runs. Without, all spellings that `save_pretrained` writes. `aliases`
    alone also has names that the checkpoint lacks, because an expert may store them; they lead to what
    `save_pretrained` keeps where that is there, else to the first of `names` that is the same tensor. A tie is the
    configuration's word: transformers breaks it where a checkpoint stores both names with other values.
    Raises FoldinError as `check_config` refuses.
    """
    spelling = _Spelling(skeleton(folder), None if names is None else tuple(names))
    model, tensors = spelling.model, spelling.model.state_dict(keep_vars=True)
    transposed = spelling.stored(_weights(model, tensors, _is_transposed))
    matrices = {
        **transposed,
        **spelling.stored(_weights(model, tensors, _is_linear)),
        **spelling.stored(_stacks(model)),
    }
    unfused = {name for name, tensor in matrices.items() if tensor.ndim > 3}  # Qwen2-VL's patches run as a linear layer
    return Anatomy(
        linear=frozenset(name for name, tensor in matrices.items() if tensor.ndim == 2),
        transposed=frozenset(transposed),
        stacked=frozenset(name for name, tensor in matrices.items() if tensor.ndim == 3),
        convolutions=frozenset(spelling.stored(_weights(model, tensors, _is_convolution))) | unfused,
        vocabulary=frozenset(spelling.stored(_of_tokens(model, tensors))),
        means=_means(spelling, tensors),
        derived=_derived(spelling, tensors),
        aliases=_aliases(spelling, tensors),
    )


def linear_weights(folder: Path, names: Iterable[str] | None = None) -> frozenset[str]:
    """The stored names of the linear weights that lie as (out, in): `anatomy`'s, less GPT-2's Conv1D.

    Embeddings, convolutions and norms are not in it, nor is an output layer tied to an embedding. Without `names` both
    spellings of an outer prefix are returned, with them only what the checkpoint has. Raises like `anatomy`.
    """
    found = anatomy(folder, names)
    return found.linear - found.transposed


@dataclass(frozen=True, eq=False)
class _Spelling:
    """How the tensors of a model are spelt in one checkpoint, or in any."""

    model: Untyped  # on the meta device
    names: tuple[str, ...] | None  # of the checkpoint; None: any

    def stored(self, tensors: Tensors) -> dict[str, Tensor]:
        """Running tensors of one kind, all that are stored together, as stored: name -> tensor without memory."""
        every = self.saved(tensors)
        if self.names is None:
            return every
        for name, tensor in tensors.items():  # transformers reads its own names too
            every.setdefault(name, tensor)
        prefix = own_prefix(self.model)
        spellings = {name: (name, prefix + name, name.removeprefix(prefix)) for name in self.names}
        known = {name: next((each for each in spelt if each in every), None) for name, spelt in spellings.items()}
        return {name: every[each] for name, each in known.items() if each is not None}

    def saved(self, tensors: Tensors) -> dict[str, Tensor]:
        """As `save_pretrained` writes them, spelt without and then with an optional outer prefix."""
        plain = revert_weight_conversion(self.model, dict(tensors))
        # Only a model that remembers its conversions gets the prefix back.
        self.model._weight_conversions = get_model_conversion_mapping(self.model, add_legacy=False)
        prefixed = revert_weight_conversion(self.model, dict(tensors))
        del self.model._weight_conversions
        return {**plain, **{name: tensor for name, tensor in prefixed.items() if name not in plain}}


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def _is_linear(module: nn.Module) -> bool:
    # A router's weight is a bare parameter, and no class or attribute tells routers but their names.
    return isinstance(module, nn.Linear) or "Router" in type(module).__name__


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups == 1


def _weights(model: Untyped, tensors: Tensors, wanted: Callable[[nn.Module], bool]) -> dict[str, Tensor]:
    """The weights of the wanted modules, less those tied to an embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if wanted(module)}
    return {name: tensor for name, tensor in tensors.items() if name in found and id(tensor) not in embeddings}


def _stacks(model: Untyped) -> dict[str, Tensor]:
    """The (experts, ·, ·) parameters of mixtures of experts; other 3-D ones (class tokens, queries) are no matrices."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "Experts" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def _of_tokens(model: Untyped, tensors: Tensors) -> dict[str, Tensor]:
    """What the token embeddings and output heads of the model and its parts hold, under every running name."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    layers = chain(
        (_layer(part.get_input_embeddings, nn.Embedding) for part in parts),
        (_layer(part.get_output_embeddings, nn.Linear) for part in parts),
    )
    rows = {id(parameter) for layer in layers if layer for parameter in layer.parameters(recurse=False)}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) in rows}


def _layer(get: Callable[[], object], kind: type[nn.Module]) -> nn.Module | None:
    """What a part of the model calls its embeddings, where these are of the kind; a part for images has no tokens."""
    try:
        layer = get()
    except (NotImplementedError, AttributeError):
        return None
    return layer if isinstance(layer, kind) else None


def _means(spelling: _Spelling, tensors: Tensors) -> dict[str, str]:
    means, variances = (
        spelling.stored({name: tensor for name, tensor in tensors.items() if name.endswith(suffix)})
        for suffix in (MEAN, VARIANCE)
    )
    pairs = {name: name.removesuffix(MEAN) + VARIANCE for name in means}
    return {mean: variance for mean, variance in pairs.items() if variance in variances}


def _derived(spelling: _Spelling, tensors: Tensors) -> frozenset[str]:
    """The model's computed buffers, and what older checkpoints store under their last name at another place."""
    computed = {
        name: buffer
        for name, buffer in spelling.model.named_buffers()
        if name not in tensors or name.endswith(FREQUENCIES)
    }
    if spelling.names is None:
        return frozenset(spelling.saved({name: buffer for name, buffer in computed.items() if name in tensors}))
    moved = {_last(name) for name in computed} - {_last(name) for name in tensors.keys() - computed.keys()}
    return frozenset(spelling.stored(computed)) | {name for name in spelling.names if _last(name) in moved}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _aliases(spelling: _Spelling, tensors: Tensors) -> dict[str, str]:
    groups: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), {})[name] = tensor
    ties = (_ties(spelling, group) for group in groups.values() if len(group) > 1)
    return {name: same for tie in ties for name, same in tie.items()}


def _ties(spelling: _Spelling, group: Tensors) -> dict[str, str]:
    """One tensor with several running names: every other name that it may be stored under -> its own."""
    tied = spelling.model.all_tied_weights_keys
    kept = next((name for name in group if name not in tied), next(iter(group)))
    alone = {kept: group[kept]}
    same = next(chain(spelling.stored(alone), spelling.stored(group), spelling.saved(alone)))
    spellings = [{**spelling.saved({name: group[name]}), **spelling.stored({name: group[name]})} for name in group]
    return {name: same for names in spellings if same not in names for name in names}
