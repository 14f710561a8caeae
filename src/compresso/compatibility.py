"""Which runtimes load a model, why, and what to do where one does not.

What can be run without a GPU is run by the tests; the rest is read from the runtime's code, at the version named.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from compresso import checkpoint
from compresso.export import FORMATS, shapes_at
from compresso.families import PER_LAYER_PREFIX, family_of
from compresso.shape import LayerShape, ModelShape, describe
from compresso.workbench import console

RUN, READ = "run by the tests", "read from its code"
VERSIONS = {"vLLM": "0.33", "SGLang": "0.5.23", "TensorRT-LLM": "main of 2026-11", "MLX": "mlx-lm 0.32.2"}


SQUARE = {"MLX": ("qwen2", "mixtral", "granite"), "vLLM": ("qwen2",), "SGLang": ("qwen2",)}
"""Families whose class there takes the hidden size over the heads for a head's width, whatever the config says."""
FOURFOLD = {"MLX": ("gpt_neox",)}
"""Families whose FFN there is four times as wide as the hidden size, whatever the config says."""


@dataclass(frozen=True)
class Verdict:
    """One runtime and one model. `loads`: the folder as it is."""

    runtime: str
    loads: bool
    why: str
    do: str
    known: str


def verdicts(model: PreTrainedModel) -> list[Verdict]:
    """What is known of every runtime about a model, which may be shapes on the meta device."""
    config, shape, family = model.config, describe(model), family_of(model.config.model_type)
    layers = shape.layers
    stock = not config.model_type.startswith(PER_LAYER_PREFIX)
    groups = {layer.num_key_value_heads for layer in layers}
    widths = {layer.intermediate_size for layer in layers}
    experts = {(layer.num_experts, layer.intermediate_size) for layer in layers if layer.experts}
    as_many = len({number for number, _ in experts}) == 1
    no_attention = 0 in groups
    differing = [
        *(["key/value heads"] if len(groups - {0}) > 1 else []),
        *(["FFN channels"] if len(widths - {0}) > 1 else []),
        *([] if as_many else ["experts"]),
        *(["no attention in some"] if no_attention else []),
        *(["no FFN in some"] if 0 in widths else []),
    ]
    unequal = f"its layers differ: {', '.join(differing) or 'heads that no stock class takes'}"
    deci = family.gguf_per_layer == "deci"
    fills = "export --to padded" if as_many else "prune --shape uniform"
    padded = {name: fills if name in family.native else "another runtime" for name in VERSIONS}
    if stock:
        read = [_of_stock(runtime, config.model_type, shape) for runtime in VERSIONS]
    else:
        nas = "export --to nemotron-nas, native there" if deci else padded["vLLM"]
        backend = "--model-impl transformers --trust-remote-code"
        same_heads, one_mixture = len(groups) == 1, not family.router or len(experts) == 1
        in_vllm = "a layer without attention is refused there" if no_attention else "per_layer_config is read"
        in_sglang = "the same heads in every layer" if same_heads else "one number of heads for all layers there"
        if not one_mixture:
            in_vllm = in_sglang = "one number and width of experts for all layers there"
        vllm, sglang = not no_attention and one_mixture, same_heads and one_mixture
        read = [
            Verdict("vLLM, own classes", False, unequal, nas, f"{READ} (0.33)"),
            Verdict("vLLM, transformers backend", vllm, in_vllm, backend if vllm else padded["vLLM"], f"{READ} (0.33)"),
            Verdict(
                "SGLang, transformers backend",
                sglang,
                in_sglang,
                backend if sglang else padded["SGLang"],
                f"{READ} (0.5.23)",
            ),
            *(
                Verdict(name, False, unequal, padded[name], f"{READ} ({VERSIONS[name]})")
                for name in ("TensorRT-LLM", "MLX")
            ),
        ]
    in_peft = "its modules are plain Linear layers", "as any model"
    if family.router:
        in_peft = "attention is plain Linear layers, experts are stacks", "target_parameters for experts"
    code = "needs nothing" if stock else "trust_remote_code=True, or import compresso"
    return [
        Verdict("transformers", True, "a stock class" if stock else "carries its own code", code, RUN),
        Verdict("PEFT", True, *in_peft, RUN),
        _llama_cpp(model),
        Verdict("onnxruntime", False, "needs an ONNX graph", "export --to onnx", RUN),
        *read,
    ]


def _of_stock(runtime: str, model_type: str, shape: ModelShape) -> Verdict:
    """What a runtime makes of a stock class, all of whose layers are as wide."""
    layer, known = shape.layers[0], f"{READ} ({VERSIONS[runtime]})"
    if runtime not in family_of(model_type).native:
        return Verdict(runtime, False, f"no class for {model_type} that we know of", "another runtime", known)
    wide = layer.num_key_value_heads * layer.columns("kv_group") == shape.hidden_size
    if model_type in SQUARE.get(runtime, ()) and not wide:
        why = "its heads have to be as wide together as the hidden size"
        return Verdict(runtime, False, why, "prune --units intermediate", known)
    if model_type in FOURFOLD.get(runtime, ()) and layer.intermediate_size != 4 * shape.hidden_size:
        why = "its FFN has to be four times as wide as the hidden size"
        return Verdict(runtime, False, why, "another runtime", known)
    do = "mlx_lm.convert" if runtime == "MLX" else f"tensor parallel over {_parallel(layer)}"
    return Verdict(runtime, True, f"a stock {model_type}", do, known)


def _llama_cpp(model: PreTrainedModel) -> Verdict:
    name = "llama.cpp, Ollama, LM Studio"
    try:
        from compresso.gguf_file import architecture_of

        why, do = f"as architecture {architecture_of(model)}", "export --to gguf"
    except ImportError:
        why, do = "needs the package gguf to tell", "pip install 'compresso-llm[gguf]'"
    except ValueError as error:
        known = family_of(model.config.model_type).gguf is not None
        why, do = str(error), "export --to padded, then --to gguf" if known else "another runtime"
        if len({layer.experts for layer in describe(model).layers} - {0}) > 1:
            do = "prune --shape uniform"
    return Verdict(name, False, why, do, RUN)


def _parallel(layer: LayerShape) -> str:
    """Over how many processes a layer may be split: key/value heads are split too, or held by several."""
    heads, groups = layer.widths["num_attention_heads"], layer.num_key_value_heads
    counts = [n for n in (1, 2, 4, 8, 16) if heads % n == 0 and layer.intermediate_size % n == 0]
    return ", ".join(str(n) for n in counts if groups % n == 0 or n % groups == 0)


def check(run: str) -> list[Verdict]:
    """Print the table for a run folder or checkpoint, and write it beside it as compatibility.json.

    Reads the config alone, where that tells. Raises FileNotFoundError or ValueError for what is no checkpoint.
    """
    place = checkpoint.find(checkpoint.of_run(run))
    found = verdicts(shapes_at(place) or checkpoint.load(place)[0])
    forms = "\n".join(f"--to {name}: {form.about}" for name, form in FORMATS.items())
    table = Table(title=Text(run), caption=forms, caption_justify="left")
    for column in ("runtime", "loads", "why", "to do", "known from"):
        table.add_column(column, overflow="fold")
    for verdict in found:
        mark = "yes" if verdict.loads else "after export" if "export" in verdict.do else "no"
        table.add_row(verdict.runtime, mark, verdict.why, Text(verdict.do), verdict.known)
    console.print(table)
    if Path(run).is_dir():
        (Path(run) / "compatibility.json").write_text(json.dumps([asdict(v) for v in found], indent=2) + "\n")
    return found
