"""Zeros around the matrices of a model, until its layers have the widths that a runtime asks for.

A zero group, query head or FFN channel adds nothing to the residual stream: the padded model computes what the
model did, and needs more memory and time for it. Not so an expert: a router would choose it.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.extract import as_in_files, sized_config
from compresso.families import Family, family_of
from compresso.shape import LayerShape, describe, rows_of_channels, rows_per_group


def largest(layers: Sequence[LayerShape]) -> LayerShape:
    """The widths that hold every one of these layers."""
    return LayerShape(
        max(layer.num_key_value_heads for layer in layers),
        max(layer.queries_per_group for layer in layers),
        layers[0].head_dim,
        max(layer.intermediate_size for layer in layers),
        None if layers[0].num_experts is None else max(layer.experts for layer in layers),
    )


def check_experts(old: Sequence[LayerShape], new: Sequence[LayerShape]) -> None:
    """Raise ValueError if a layer of a mixture is to have experts that it has not, unless it lost all of them."""
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        if before.experts not in (0, after.experts):
            raise ValueError(
                f"layer {i} has {before.experts} experts, and {after.experts} are asked for; a router would choose an "
                "expert of zeros, so that the number of experts cannot be filled up. `compresso prune --shape uniform` "
                "keeps as many in each layer; `--to hf` carries the code for unequal ones"
            )


def alike(model: PreTrainedModel) -> list[LayerShape]:
    """The least widths, the same in every layer, that hold the model and that its stock class takes."""
    shape = describe(model)
    widest = largest(shape.layers)
    if family_of(model.config.model_type).derived_head_dim:
        queries = max(1, widest.queries_per_group)
        groups = shape.hidden_size // widest.head_dim // queries
        widest = replace(widest, num_key_value_heads=groups, queries_per_group=queries)
    return [widest] * len(shape.layers)


def padded_config(model: PreTrainedModel, layers: Sequence[LayerShape]) -> PreTrainedConfig:
    """The config of the model with layers of these widths."""
    widths = [layer.widths for layer in layers]
    hidden_size = describe(model).hidden_size
    return sized_config(model.config, model.state_dict(), widths, hidden_size, range(len(layers)))


@torch.no_grad()
def pad(model: PreTrainedModel, layers: Sequence[LayerShape]) -> PreTrainedModel:
    """The same model with layers of these widths, one entry a layer; a sub-layer that was removed comes back as zeros.

    Raises ValueError if a layer does not fit into what is asked for, or has other experts.
    """
    shape = describe(model)
    for i, (old, new) in enumerate(zip(shape.layers, layers, strict=True)):
        if largest([old, new]) != new:
            raise ValueError(f"layer {i} is {old}, which does not fit into {new}")
    check_experts(shape.layers, layers)
    if tuple(layers) == shape.layers:
        return model
    family, weights = family_of(model.config.model_type), model.state_dict()
    config = padded_config(model, layers)
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        asked = {name: empty.shape for name, empty in model_class(config).state_dict().items()}
    rows, columns = _places(family, shape.layers, layers)
    padded = {}
    for name, size in asked.items():
        old_weight = weights.get(name)
        module, kind = (name, "weight") if name in rows or name in columns else name.rpartition(".")[::2]
        if old_weight is not None and old_weight.shape == size:
            padded[name] = old_weight
            continue
        padded[name] = new_weight = torch.zeros(size, dtype=model.dtype, device=model.device)
        if old_weight is None:
            if len(size) == 1 and kind == "weight":
                new_weight.fill_(1)  # the norm of a sub-layer that is zero
        elif module in rows:
            new_weight.index_copy_(max(0, len(size) - 2), rows[module].to(model.device), old_weight)
        else:
            new_weight.index_copy_(-1, columns[module].to(model.device), old_weight)
    state = as_in_files(config.model_type, padded.items())
    wider = model_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    wider.generation_config = copy.deepcopy(model.generation_config)
    return wider.to(model.device).eval()


def with_equal_queries(layers: Sequence[LayerShape]) -> list[LayerShape]:
    """These widths with as many query heads in every layer, at the least cost in rows.

    Some groups are added where their number would not divide that of the heads; query heads fill up the groups.
    """
    alive = [layer for layer in layers if layer.num_key_value_heads]
    if not alive:
        return list(layers)
    least = max(layer.num_key_value_heads * layer.queries_per_group for layer in alive)

    def groups_for(layer: LayerShape, heads: int) -> int:
        """Fewest groups that hold the layer's and divide the heads; `heads` + 1 if there is no such number."""
        fitting = range(layer.num_key_value_heads, heads // layer.queries_per_group + 1)
        return next((groups for groups in fitting if heads % groups == 0), heads + 1)

    def rows(heads: int) -> int:
        return sum(2 * heads + 2 * groups_for(layer, heads) for layer in alive)

    fitting = [h for h in range(least, 4 * least + 1) if all(groups_for(layer, h) <= h for layer in alive)]
    heads = min(fitting, key=rows)
    return [
        replace(layer, num_key_value_heads=(groups := groups_for(layer, heads)), queries_per_group=heads // groups)
        if layer.num_key_value_heads
        else layer
        for layer in layers
    ]


def _places(
    family: Family, old: Sequence[LayerShape], new: Sequence[LayerShape]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Where the rows and the columns of each matrix go in the wider one."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        groups, channels = torch.arange(before.num_key_value_heads), torch.arange(before.intermediate_size)
        prefix = f"{family.layers}.{i}."
        wider = rows_per_group(family, after)
        queries = torch.arange(before.columns("kv_group"))
        for path, each in rows_per_group(family, before).items():
            # queries come first in a group; what follows them moves by what they grow
            within = torch.arange(each)
            within[len(queries) :] += wider[path] - each
            rows[prefix + path] = _in_groups(groups, within, wider[path])
        inputs = rows_of_channels(family, channels, after.intermediate_size)
        rows |= {prefix + path: inputs for path in family.mlp_inputs}
        columns[prefix + family.attention_output] = _in_groups(groups, queries, after.columns("kv_group"))
        columns[prefix + family.mlp_output] = channels
    return rows, columns


def _in_groups(groups: Tensor, within: Tensor, each: int) -> Tensor:
    """Indices of the entries `within` of these groups, of `each` entries."""
    return (groups[:, None] * each + within).flatten()
