"""Apply a Plan: a new, physically smaller model that computes what the gated one computed."""

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from compresso import per_layer
from compresso.cutting import cut_weights, kept_layers
from compresso.families import FAMILIES, PER_LAYER_PREFIX, Family, family_of, tensors_in_files
from compresso.plan import Plan
from compresso.shape import ModelShape, describe, head_dim_of

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
    check_fit(plan, describe(model), family_of(model.config.model_type))
    old = model.state_dict()
    config = smaller_config(model.config, old, plan)
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._attn_implementation = model.config._attn_implementation
    if family_of(config.model_type).router:
        config._experts_implementation = model.config._experts_implementation
    weights = as_in_files(config.model_type, cut_weights(old, model.config.model_type, plan))
    smaller = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).train(model.training)


def as_in_files(model_type: str, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Weights by the names that files of a model_type hold them under; a stack of experts in its parts, without a copy.

    What is loaded so, transformers saves so.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights:
        parts = tensors_in_files(model_type, name, tuple(weight.shape))
        found |= zip((part for part, _ in parts), weight.reshape(len(parts), *parts[0][1]), strict=True)
    return found


def check_fit(plan: Plan, shape: ModelShape, family: Family) -> None:
    """Raise ValueError if the plan was made for another shape, or takes what the family cannot lack exactly."""
    if shape != plan.shape:
        raise ValueError(
            f"the plan fits a model of {len(plan.shape.layers)} layers and hidden size {plan.shape.hidden_size} with "
            f"its widths, not this one of {len(shape.layers)} and {shape.hidden_size}; a plan fits only the model "
            "it was made from"
        )
    for unit in family.fixed:
        for layer, (kept, size) in enumerate(zip(plan.keep[unit], shape.sizes(unit), strict=True)):
            if 0 < len(kept) < size:
                whose = "a model" if unit == "hidden" else f"layer {layer}"
                raise ValueError(f"{whose} of this family cannot lack some of its {unit} and compute the same")
    for unit in ("intermediate", "hidden"):
        for kept, size in zip(plan.keep[unit], shape.sizes(unit), strict=True):
            if len(kept) < size and len(kept) % family.multiple:
                raise ValueError(
                    f"the plan keeps {len(kept)} {unit} channels, and the kernel that multiplies stacked experts takes "
                    f"multiples of {family.multiple}; --round-to {family.multiple} makes them"
                )


def smaller_config(old: PreTrainedConfig, names: Collection[str], plan: Plan) -> PreTrainedConfig:
    """The config of the smaller model; `names` are those of the weights of the whole one."""
    kept = kept_layers(plan)
    return sized_config(old, names, [plan.widths()[i] for i in kept], len(plan.keep["hidden"][0]), kept)


def sized_config(
    old: PreTrainedConfig,
    names: Collection[str],
    widths: Sequence[dict[str, int]],
    hidden_size: int,
    layers: Sequence[int],
) -> PreTrainedConfig:
    """The config of a model like `old`, with these widths (as `Plan.widths` gives them), one entry a layer.

    `names` are those of the weights of `old`, `layers` the indices of the layers of `old` that the new ones are.
    """
    settings = {
        key: value
        for key, value in old.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version")
    }
    base = old.model_type.removeprefix(PER_LAYER_PREFIX)
    family = FAMILIES[base]
    widest = {key: max(width[key] for width in widths) for key in widths[0]}
    for key in widest.keys() - {"intermediate_size"}:
        widest[key] = widest[key] or 1  # every attention is gone: the value is never used
    settings |= {"hidden_size": hidden_size, "num_hidden_layers": len(widths), "head_dim": head_dim_of(old)}
    settings |= {old.attribute_map.get(name, name): width for name, width in family.in_config(widest).items()}
    if family.norm_eps:
        settings[family.norm_eps] = getattr(old, family.norm_eps) * (old.hidden_size / hidden_size)
    for name in family.config_lists:
        if settings.get(name):
            settings[name] = [settings[name][i] for i in layers]
    overrides = {j: _override(width, widest, family) for j, width in enumerate(widths)}
    if not any(overrides.values()):
        biased = any(name.endswith("_proj.bias") for name in names)
        stock = _stock_config(base, family, settings, biased)
        if stock is not None:
            return stock
    config = AutoConfig.for_model(PER_LAYER_PREFIX + base, **settings)
    config.per_layer_config = {j: override for j, override in overrides.items() if override}
    return config


def _override(width: dict[str, int], common: dict[str, int], family: Family) -> dict:
    """What differs in one layer from the common widths, by the names of the config."""
    skip = [
        name for name, key in (("attention", "num_key_value_heads"), ("mlp", "intermediate_size")) if not width[key]
    ]
    different = {key: value for key, value in width.items() if value and value != common[key]}
    return {**family.in_config(different), **({"skip": skip} if skip else {})}


def _stock_config(base: str, family: Family, settings: dict, biased: bool) -> PreTrainedConfig | None:
    """The family's own config class, or its stand-in, whichever takes these widths."""
    stand_in = None if biased else family.stand_in
    if family.derived_head_dim:
        head_dim = settings["head_dim"]
        if settings["num_attention_heads"] * head_dim != settings["hidden_size"]:
            return None
        settings = {key: value for key, value in settings.items() if key != "head_dim"}
    try:
        return AutoConfig.for_model(base, **settings)
    except (ValueError, StrictDataclassError):
        if stand_in is None:
            return None
    defaults = AutoConfig.for_model(stand_in).to_dict()
    known = {key: value for key, value in settings.items() if key in defaults or key not in AutoConfig.for_model(base)}
    return AutoConfig.for_model(stand_in, **known, sliding_window=None)
