"""A pruned model in the form that a runtime loads, compared with the model that it was made from."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compresso import checkpoint, nemotron_nas, whole_files
from compresso.config import nearest
from compresso.families import FAMILIES, PER_LAYER_PREFIX
from compresso.padding import alike, check_experts, largest, pad, padded_config, with_equal_queries
from compresso.prompts import find_prompt
from compresso.shape import LayerShape, describe, main_rope
from compresso.streamed import shapes_of
from compresso.unfused import taken_apart
from compresso.workbench import console, release_memory, status

AutoConfig.register("nemotron-nas", nemotron_nas.DeciLMConfig)
transformers.AutoModel.register(nemotron_nas.DeciLMConfig, nemotron_nas.DeciLMModel)
AutoModelForCausalLM.register(nemotron_nas.DeciLMConfig, nemotron_nas.DeciLMForCausalLM)

TEXT = "The capital of France is Paris. Water boils at 100 degrees, and 3 + 4 = 7.\nOnce upon a time there was a "
PROBE = 24  # tokens of it
LIKELY = 20  # most likely next tokens that are compared
TOLD = 200  # most likely next tokens that llama.cpp is asked for
TOLERANCE = {"f32": 0.005, "f16": 0.05, "bf16": 0.2, "q8_0": 0.3}
"""Mean difference of a log probability. Formats of fewer bits are measured and not judged."""
EXACT_UP_TO = 2_000_000_000  # parameters of a model that is compared in float32; larger ones in their own numbers


@dataclass(frozen=True)
class Export:
    """What is being written, and where to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    base: str
    """What the card calls the model."""
    kind: str
    """Number format of a GGUF file's matrices, a name in `gguf_numbers.MIXES`."""

    def save(self, model: PreTrainedModel, loading: str = "") -> None:
        """Write a checkpoint folder."""
        prompt = checkpoint.prompt_of(self.model.config) or find_prompt("none", "auto")
        card = checkpoint.model_card(self.model, self.base, prompt, {"model": self.base}, loading)
        checkpoint.save(model, self.tokenizer, prompt, self.folder, card)


@dataclass(frozen=True)
class Format:
    """One form of a model.

    `refuse` gets the model, or its shapes, and the tokenizer and raises ValueError for what the form cannot hold.
    `write` writes. `predict` gives the log probabilities (T, vocabulary) of what was written after each of T tokens,
    NaN where it tells none; None if its runtime is not installed.
    """

    about: str
    refuse: Callable[[PreTrainedModel, PreTrainedTokenizerBase], None]
    write: Callable[[Export], None]
    predict: Callable[[Export, Tensor], Tensor | None]


def export(run: str, to: str, output: str, kind: str = "f16") -> dict[str, Any]:
    """Write the model of a run folder or checkpoint as `to`, a name in FORMATS, into the folder `output`.

    Returns what was written, and how far its predictions are from the model's. Raises ValueError, before any work is
    done, for what the format cannot hold, with the nearest that works; RuntimeError if the result is another model.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}{nearest(to, FORMATS)}; formats are {', '.join(FORMATS)}")
    folder, form = Path(output), FORMATS[to]
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another --output")
    if to == "gguf":
        _gguf_numbers().check(kind)
    place = checkpoint.find(checkpoint.of_run(run))
    shapes = shapes_at(place)
    if shapes is not None:
        form.refuse(shapes, checkpoint.load_tokenizer(place))
    with status(f"loading {run}"):
        model, tokenizer = checkpoint.load(place)
    if shapes is None:
        form.refuse(model, tokenizer)
    with whole_files.new_folder(folder) as partial:
        made = Export(model, tokenizer, partial, Path(run).name, kind)
        with status(f"writing {folder}"):
            form.write(made)
        release_memory()
        with status(f"loading what was written, and comparing it with {run}"):
            difference = _difference(made, form, kind if to == "gguf" else "f32")
        facts = {
            "format": to,
            "model": run,
            "bytes": sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()),
            **({"type": kind} if to == "gguf" else {}),
            **difference,
        }
        (partial / "export.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def shapes_at(place: str) -> PreTrainedModel | None:
    """The model of a checkpoint as shapes; None where only its weights tell them."""
    if place.endswith(".gguf"):
        return None
    return shapes_of(taken_apart(AutoConfig.from_pretrained(place, trust_remote_code=False)))


def show(facts: dict[str, Any], output: str) -> None:
    """Tell what was written, and how it compares."""
    console.print(f"{output}: {facts['format']}, {facts['bytes'] / 1e6:,.1f} MB", markup=False, highlight=False)
    if facts["checked"]:
        found = facts["log_probability_difference"]
        console.print(f"loaded again; log probabilities differ by {found:.1e} on average", highlight=False)
    else:
        console.print("llama.cpp is not here, so it was not loaded again (pip install xllamacpp)", highlight=False)


@torch.no_grad()
def _difference(made: Export, form: Format, kind: str) -> dict[str, Any]:
    """How far log probabilities of likely next tokens are apart. Raises RuntimeError if that is no rounding."""
    ids = torch.tensor(made.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:PROBE])
    model = made.model
    if sum(p.numel() for p in model.parameters()) <= EXACT_UP_TO:
        checkpoint.cast(model, torch.float32)
    expected = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
    if not expected.isfinite().all():
        raise ValueError("the model's probabilities are not numbers (NaN or infinite); its weights may be damaged")
    actual = form.predict(made, ids)
    if actual is None:
        return {"checked": False}
    likely = expected.topk(min(LIKELY, expected.shape[1])).indices
    apart = (actual.gather(1, likely) - expected.gather(1, likely)).abs()
    found = float(apart[~apart.isnan()].mean())
    own = TOLERANCE["f32" if model.dtype == torch.float32 else "bf16"]
    allowed = max(own, TOLERANCE.get(kind, math.inf))
    if not found <= allowed:
        raise RuntimeError(
            f"what was written differs by {found:.2e} in a log probability on average, more than {allowed}. "
            "This is a bug of compresso, please report it with config.json of the model"
        )
    return {"checked": True, "log_probability_difference": found}


def _predict_folder(made: Export, ids: Tensor) -> Tensor:
    dtype = made.model.dtype
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=dtype, trust_remote_code=False).eval()
    return torch.log_softmax(model(ids[None]).logits[0].float(), -1)


def _accept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything can be written so."""


def _refuse_unequal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    layers = describe(model).layers
    if len(set(layers)) > 1 or layers[0] != largest(layers):
        raise ValueError(
            f"no stock class holds this model: its layers differ in width ({_span(layers)}). `--to padded` fills "
            "them up with zeros, `--to hf` carries the code that loads it, `--to gguf` is for llama.cpp; "
            "`compresso prune --shape uniform` keeps layers equal"
        )
    _refuse_heads(model.config)


def _refuse_heads(config: PreTrainedConfig) -> None:
    """Equal widths that no stock class takes."""
    if config.model_type.startswith(PER_LAYER_PREFIX):
        name = config.model_type.removeprefix(PER_LAYER_PREFIX)
        filled = FAMILIES[name].derived_head_dim
        others = "`--to padded` fills them up with zeros" if filled else "`--to gguf` is for llama.cpp"
        raise ValueError(
            f"the config of {name} takes no {config.num_attention_heads} heads at a hidden size of "
            f"{config.hidden_size}, and no other class computes the same; `--to hf` carries the code that loads it, "
            + others
        )


def _span(layers: tuple[LayerShape, ...]) -> str:
    parts = []
    names = {"num_key_value_heads": "key/value heads", "intermediate_size": "FFN channels", "num_experts": "experts"}
    for key in [key for key in names if key in layers[0].widths]:
        name, values = names[key], [layer.widths[key] for layer in layers]
        parts.append(f"{min(values)} to {max(values)} {name}" if len(set(values)) > 1 else f"{values[0]} {name}")
    return ", ".join(parts)


def _refuse_unpaddable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    check_experts(describe(model).layers, alike(model))
    _refuse_heads(padded_config(model, alike(model)))


def _write_padded(made: Export) -> None:
    made.save(pad(made.model, alike(made.model)))


def _refuse_nas(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config, name = model.config, model.config.model_type.removeprefix(PER_LAYER_PREFIX)
    if FAMILIES[name].gguf_per_layer != "deci":
        raise ValueError(
            f"nemotron-nas computes what Llama, Mistral and Qwen2 do, not {name}; `--to padded` is what vLLM loads"
        )
    if getattr(config, "sliding_window", None):
        raise ValueError(
            f"nemotron-nas knows no sliding window, and this model has one of {config.sliding_window}; `--to hf` or "
            "`--to padded` keep it"
        )


def _write_nas(made: Export) -> None:
    """The model as DeciLM: query heads filled up with zeros, so that all layers have as many."""
    layers = list(describe(made.model).layers)
    if not layers[0].num_key_value_heads:  # vLLM's first layer makes the residual stream
        some = largest(layers)
        layers[0] = replace(layers[0], num_key_value_heads=1, queries_per_group=max(1, some.queries_per_group))
    layers = with_equal_queries(layers)
    padded = pad(made.model, layers)
    heads = max(layer.widths["num_attention_heads"] for layer in layers) or 1
    names = list(padded.state_dict())
    dropped = ("model_type", "architectures", "auto_map", "per_layer_config", "layer_types", "sliding_window")
    settings = {key: value for key, value in padded.config.to_dict().items() if key not in dropped}
    settings |= {
        "num_attention_heads": heads,
        "num_key_value_heads": max(max(layer.num_key_value_heads for layer in layers), 1),
        "intermediate_size": max(max(layer.intermediate_size for layer in layers), 1),
        "attention_bias": any(name.endswith("o_proj.bias") for name in names),
        "qkv_bias": any(name.endswith("q_proj.bias") for name in names),
        "mlp_bias": any(name.endswith("down_proj.bias") for name in names),
        "block_configs": [_block(layer) for layer in layers],
    }
    config = nemotron_nas.DeciLMConfig(**settings)
    model = nemotron_nas.DeciLMForCausalLM.from_pretrained(
        None, config=config, state_dict=padded.state_dict(), dtype=made.model.dtype
    )
    made.save(model, "```sh\nvllm serve . --trust-remote-code\n```\n\nThe code is that of its config alone in vLLM.")


def _block(layer: LayerShape) -> dict[str, Any]:
    groups, width = layer.num_key_value_heads, layer.intermediate_size
    attention = {"no_op": not groups, "replace_with_linear": False}
    ffn = {"no_op": not width, "replace_with_linear": False}
    return {
        "attention": attention | ({"n_heads_in_group": layer.queries_per_group} if groups else {}),
        "ffn": ffn | ({"intermediate_size": width} if width else {}),
    }


def _gguf_numbers() -> Any:
    try:
        from compresso import gguf_numbers
    except ImportError:
        raise ValueError("writing .gguf needs the package gguf: pip install 'compresso-llm[gguf]'") from None
    return gguf_numbers


def _refuse_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from gguf import GGUFWriter

    from compresso import gguf_file, gguf_tokens

    name = gguf_file.architecture_of(model)
    rows = model.get_input_embeddings().weight.shape[0]
    gguf_tokens.write_tokens(GGUFWriter(None, name), tokenizer, rows)


def _write_gguf(made: Export) -> None:
    from compresso import gguf_file

    gguf_file.write(made.model, made.tokenizer, made.folder / "model.gguf", made.kind, made.base)


def _predict_gguf(made: Export, ids: Tensor) -> Tensor | None:
    """In llama.cpp, which must also divide a text as the tokenizer does."""
    from compresso.gguf_tokens import SAMPLE
    from compresso.llama_cpp import LlamaCpp, installed

    if not installed():
        return None
    runtime = LlamaCpp(made.folder / "model.gguf", threads=torch.get_num_threads())
    for text in (TEXT, SAMPLE):
        expected, actual = made.tokenizer(text)["input_ids"], runtime.tokens(text)
        if actual != expected:
            raise RuntimeError(
                f"llama.cpp divides {text!r} into {actual}, the tokenizer into {expected}. This is a bug of "
                "compresso, please report it with tokenizer.json of the model"
            )
    rows = made.model.get_input_embeddings().weight.shape[0]
    predicted = torch.full((len(ids), rows), torch.nan)
    for i in range(len(ids)):
        for token, value in runtime.log_probabilities(ids[: i + 1].tolist(), TOLD).items():
            predicted[i, token] = value
    return predicted


def _refuse_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from compresso import onnx_file

    onnx_file.check()
    kind = main_rope(model.config).get("rope_type")
    if kind in ("longrope", "dynamic"):
        raise ValueError(
            f"the positions of this model are scaled by how long a text is (rope_type {kind}), which an ONNX graph "
            "cannot hold; export --to gguf, or use another runtime"
        )


def _write_onnx(made: Export) -> None:
    from compresso import onnx_file

    onnx_file.write(checkpoint.cast(made.model, torch.float32), made.folder / "model.onnx")
    made.model.config.save_pretrained(made.folder)
    made.tokenizer.save_pretrained(made.folder)


def _predict_onnx(made: Export, ids: Tensor) -> Tensor:
    """In two parts, so that the second one needs the cache of the first."""
    from compresso.onnx_file import Onnx

    runtime, half = Onnx(made.folder / "model.onnx"), len(ids) // 2
    return torch.log_softmax(torch.cat([runtime.logits(ids[:half]), runtime.logits(ids[half:])]), -1)


def _write_as_it_is(made: Export) -> None:
    made.save(made.model)


FORMATS = {
    "stock": Format("a stock class, for equal widths", _refuse_unequal, _write_as_it_is, _predict_folder),
    "padded": Format("a stock class, filled up with zeros", _refuse_unpaddable, _write_padded, _predict_folder),
    "hf": Format("transformers, with code for unequal layers", _accept, _write_as_it_is, _predict_folder),
    "nemotron-nas": Format("NVIDIA's DeciLM, native in vLLM", _refuse_nas, _write_nas, _predict_folder),
    "gguf": Format("llama.cpp, Ollama, LM Studio", _refuse_gguf, _write_gguf, _predict_gguf),
    "onnx": Format("onnxruntime, with a key/value cache", _refuse_onnx, _write_onnx, _predict_onnx),
}
