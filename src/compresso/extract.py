"""Apply a Plan: a new, physically smaller model that computes what the gated one computed.

Rows and columns of removed units are left out, kept soft gates are folded into the
weights behind them, and RMSNorm is corrected for the hidden channels that it no longer
averages over.
"""

import copy
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compresso import per_layer
from compresso.families import FAMILIES, PER_LAYER_PREFIX, Family, family_of
from compresso.plan import Plan
from compresso.shape import describe, head_dim_of

_classes: list[Any] = per_layer.CLASSES
for _config, _base, _causal in _classes:
    AutoConfig.register(_config.model_type, _config)
    transformers.AutoModel.register(_config, _base)
    AutoModelForCausalLM.register(_config, _causal)


def extract(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Build the smaller model; `model` stays as it is.

    Equal widths give a stock class, unequal widths its `per_layer` form. Layers that lost
    both sub-layers are left out. The weights keep their dtype and device. Raises
    ValueError if the plan was made for another shape.
    """
    shape = describe(model)
    if shape != plan.shape:
        raise ValueError(
            f"the plan fits a model of {len(plan.shape.layers)} layers and hidden size {plan.shape.hidden_size} with "
            f"its widths, not this one of {len(shape.layers)} and {shape.hidden_size}; a plan fits only the model "
            "it was made from"
        )
    weights = _cut_weights(model, plan)
    config = _smaller_config(model, plan)
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._attn_implementation = model.config._attn_implementation
    smaller = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).train(model.training)


def _kept_layers(plan: Plan) -> list[int]:
    return [
        i
        for i, width in enumerate(plan.widths())
        if width["num_key_value_heads"] or width["intermediate_size"] or len(plan.shape.layers) == 1
    ]


def _cut_weights(model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """The state dict of the smaller model."""
    family = family_of(model.config.model_type)
    old = model.state_dict()
    hidden = plan.keep["hidden"][0].to(model.device)
    norm_scale = (plan.shape.hidden_size / len(hidden)) ** 0.5
    new = {}

    def take(name: str, target: str, rows: Tensor | None, columns: Tensor | None, by: Tensor | float = 1.0) -> None:
        """Keep rows and columns of a weight, and the rows of a bias, times `by`."""
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" not in old:
                continue
            tensor = old[f"{name}.{kind}"]
            tensor = tensor if rows is None else tensor.index_select(0, rows)
            if kind == "weight" and columns is not None:
                tensor = tensor.index_select(1, columns)
            if not (isinstance(by, float) and by == 1.0):
                tensor = (tensor.double() * by).to(tensor.dtype)
            new[f"{target}.{kind}"] = tensor.clone()

    take(family.embedding, family.embedding, None, hidden)
    take(family.final_norm, family.final_norm, hidden, None, norm_scale)
    take(family.head, family.head, None, hidden)
    gates = {u: g.to(model.device).split(plan.shape.sizes(u)) for u, g in plan.gates.items()}
    keep = {u: [k.to(model.device) for k in layers] for u, layers in plan.keep.items()}
    for j, i in enumerate(_kept_layers(plan)):
        source, target = f"{family.layers}.{i}.", f"{family.layers}.{j}."
        groups, channels = keep["kv_group"][i], keep["intermediate"][i]
        if len(groups):
            layer = plan.shape.layers[i]
            key_rows = _expand(groups, layer.head_dim)
            query_rows = _expand(groups, layer.head_dim * layer.queries_per_group)
            # q/k norms share an eps that grows with norm_scale squared: so must what they divide
            into_norm = norm_scale if family.query_key_norms else 1.0
            take(source + family.query, target + family.query, query_rows, hidden, into_norm)
            take(source + family.key, target + family.key, key_rows, hidden, into_norm)
            take(source + family.value, target + family.value, key_rows, hidden)
            take(source + family.attention_norm, target + family.attention_norm, hidden, None, norm_scale)
            take(source + family.attention_output, target + family.attention_output, hidden, query_rows)
            per_group = gates["kv_group"][i][groups].repeat_interleave(layer.head_dim * layer.queries_per_group)
            _fold(new, target + family.attention_output, per_group, float(gates["attention"][i]))
            for name in old:  # what belongs to a head dimension and stays: q and k norms
                if name.startswith(source + family.attention + ".") and _target(name, source, target) not in new:
                    new[_target(name, source, target)] = old[name].clone()
        if len(channels):
            for path in family.mlp_inputs:
                take(source + path, target + path, channels, hidden)
            take(source + family.mlp_norm, target + family.mlp_norm, hidden, None, norm_scale)
            take(source + family.mlp_output, target + family.mlp_output, hidden, channels)
            _fold(new, target + family.mlp_output, gates["intermediate"][i][channels], float(gates["mlp"][i]))
    return new


def _target(name: str, source: str, target: str) -> str:
    return target + name.removeprefix(source)


def _expand(groups: Tensor, rows: int) -> Tensor:
    """Indices of the rows that these groups own, `rows` each."""
    return (groups[:, None] * rows + torch.arange(rows, device=groups.device)).flatten()


def _fold(weights: dict[str, Tensor], name: str, per_column: Tensor, overall: float) -> None:
    """Multiply the columns of a matrix by the gates at its input, all of it by the one at its output."""
    weight = weights[f"{name}.weight"]
    if overall != 1 or (per_column != 1).any():
        weights[f"{name}.weight"] = (weight.double() * per_column * overall).to(weight.dtype)
    if overall != 1 and f"{name}.bias" in weights:
        weights[f"{name}.bias"] = (weights[f"{name}.bias"].double() * overall).to(weight.dtype)


def _smaller_config(model: PreTrainedModel, plan: Plan) -> PreTrainedConfig:
    old = model.config
    kept = _kept_layers(plan)
    widths = [plan.widths()[i] for i in kept]
    hidden_size = len(plan.keep["hidden"][0])
    settings = {
        key: value
        for key, value in old.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version")
    }
    settings |= {
        "hidden_size": hidden_size,
        "num_hidden_layers": len(kept),
        "head_dim": head_dim_of(old),
        "rms_norm_eps": old.rms_norm_eps * (plan.shape.hidden_size / hidden_size),
        **{key: max(width[key] for width in widths) for key in widths[0]},
    }
    for key in ("num_key_value_heads", "num_attention_heads"):
        settings[key] = settings[key] or 1  # every attention is gone: the value is never used
    if settings.get("layer_types"):
        settings["layer_types"] = [settings["layer_types"][i] for i in kept]
    overrides = {j: _override(width, settings) for j, width in enumerate(widths)}
    base = old.model_type.removeprefix(PER_LAYER_PREFIX)
    if not any(overrides.values()):
        stock = _stock_config(base, FAMILIES[base], settings, model)
        if stock is not None:
            return stock
    config = AutoConfig.for_model(PER_LAYER_PREFIX + base, **settings)
    config.per_layer_config = {j: override for j, override in overrides.items() if override}
    return config


def _override(width: dict[str, int], common: dict) -> dict:
    """What differs in one layer from the common widths."""
    skip = [
        name for name, key in (("attention", "num_key_value_heads"), ("mlp", "intermediate_size")) if not width[key]
    ]
    different = {key: value for key, value in width.items() if value and value != common[key]}
    return {**different, **({"skip": skip} if skip else {})}


def _stock_config(base: str, family: Family, settings: dict, model: PreTrainedModel) -> PreTrainedConfig | None:
    """The family's own config class, or its stand-in, whichever takes these widths."""
    biased = any(name.endswith("_proj.bias") for name in model.state_dict())
    stand_in = None if biased else family.stand_in
    try:
        return AutoConfig.for_model(base, **settings)
    except (ValueError, StrictDataclassError):
        if stand_in is None:
            return None
    defaults = AutoConfig.for_model(stand_in).to_dict()
    known = {key: value for key, value in settings.items() if key in defaults or key not in AutoConfig.for_model(base)}
    return AutoConfig.for_model(stand_in, **known, sliding_window=None)
