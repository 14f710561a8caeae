"""Checkpoints in and out: stock Hugging Face folders, hub ids and GGUF files; never pickles, never remote code."""

import copy
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compresso import demo, hub, nemotron_nas, per_layer
from compresso.config import nearest_path
from compresso.families import PER_LAYER_PREFIX, family_of
from compresso.prompts import CollaborativePrompt
from compresso.shape import describe
from compresso.unfused import UNFUSED

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
REMOTE_CODE = {per_layer: "modeling_compresso.py", nemotron_nas: "modeling_decilm.py"}
"""What files of classes are called in a checkpoint that they travel with."""
SHARD_SIZE = "5GB"
BAD_CONFIG = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)
BAD_WEIGHTS = (*BAD_CONFIG, AssertionError, RuntimeError, SafetensorError)


def of_run(model: str) -> str:
    """The checkpoint that a name means: a run folder's own, else the name as it is."""
    inner = Path(model) / "model"
    return str(inner) if inner.is_dir() and not (Path(model) / "config.json").exists() else model


def find(model: str, any_family: bool = False) -> str:
    """Where a model lies: the name of a folder, a .gguf file or a hub id, after a look at its config.

    `model` is one of these or `demo`. Raises FileNotFoundError or ValueError for what can be
    known to be unusable without its weights.
    """
    if model == "demo":
        return str(demo.model_file())
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}{nearest_path(path)}")
        return model
    if path.is_dir():
        _check_folder(path, any_family)
    elif path.exists():
        raise ValueError(f"{path} is a file; expected a checkpoint folder, a .gguf file or a hub id")
    elif "://" in model:
        name = "/".join(model.rstrip("/").split("/")[-2:])
        raise ValueError(f"{model} is an address; pass the hub id alone ({name}), or a local folder")
    elif model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no checkpoint folder {path}{nearest_path(path)}; expected a folder with config.json and *.safetensors"
        )
    try:
        config = hub.fetch(model, lambda: AutoConfig.from_pretrained(model, trust_remote_code=False))
    except hub.Unavailable as error:
        raise hub.Unavailable(f"no folder {model!r}{nearest_path(path)}, and {error}") from error
    except BAD_CONFIG as error:
        raise _unreadable(model, path.is_dir(), error) from error
    if not any_family:
        _check_family(config.model_type)
        _refuse_quantised(model, config)
    return model


def _check_family(model_type: str) -> None:
    """Raise ValueError for a model_type that is none of FAMILIES, and is not turned into one."""
    if model_type not in UNFUSED:
        family_of(model_type)


def load(
    model: str | Path, dtype: torch.dtype | None = None, any_family: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a supported family, or of any, and its tokenizer, in `dtype` or the stored one.

    Raises FileNotFoundError or ValueError, with what was found and what to do, for
    everything that cannot be loaded.
    """
    model = find(str(model), any_family)
    if model.endswith(".gguf"):
        return _load_gguf(Path(model), dtype, any_family)

    def weights() -> tuple[PreTrainedModel, dict]:
        return AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )

    try:
        loaded, info = hub.fetch(model, weights)
    except hub.Unavailable:
        raise
    except BAD_WEIGHTS as error:
        raise ValueError(f"the weights of {model} cannot be loaded: {first_line(error)}") from error
    _refuse_incomplete(model, info)
    if not any_family and loaded.config.model_type in UNFUSED:
        loaded = UNFUSED[loaded.config.model_type](loaded)
    return loaded.eval(), load_tokenizer(model)


def _unreadable(model: str, local: bool, error: Exception) -> Exception:
    if local:
        return ValueError(f"{model}/config.json cannot be read: {first_line(error)}")
    return FileNotFoundError(
        f"no folder {model!r}{nearest_path(model)}, and the hub gave no such model ({first_line(error)}). Check the "
        "spelling, or pass a local folder, or `demo`"
    )


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return lines[0] if not lines[0].endswith(":") or len(lines) == 1 else f"{lines[0]} {lines[1]}"


def _check_folder(folder: Path, any_family: bool) -> None:
    """Say what is wrong with a folder before transformers tries it."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; it holds {ggufs[0].name}, pass that file" if ggufs else ""
        if (folder / "model" / "config.json").is_file():
            hint = f"; it is a run folder, pass {folder / 'model'}"
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter, merge it first (merge_and_unload of peft) and save the whole model"
        hint = hint or "; expected config.json, *.safetensors and a tokenizer"
        raise FileNotFoundError(f"{folder} has no config.json, so it is no checkpoint{hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged or names no model_type: {first_line(error)}") from error
    if not any_family:
        _check_family(str(model_type))
    if not any(folder.glob("*.safetensors")):
        pickles = [file.name for pattern in PICKLED for file in folder.glob(pattern)]
        if pickles:
            raise ValueError(
                f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when loaded. Convert "
                "it to safetensors first, on a machine and from a source that you trust"
            )
        raise FileNotFoundError(
            f"{folder} has no *.safetensors weights; copy them there, or fetch the whole model: `hf download ID "
            f"--local-dir {folder}`"
        )


def _refuse_quantised(model: str, config: transformers.PreTrainedConfig) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised.quant_method
        raise ValueError(
            f"{model} is quantised ({method}); pruning needs the weights themselves. Use the original checkpoint, "
            "or a .gguf file, which is dequantised"
        )


def _refuse_incomplete(model: str, info: dict) -> None:
    """transformers fills what is missing with random numbers."""
    lacking = sorted(info["missing_keys"]) or sorted(key[0] for key in info.get("mismatched_keys", ()))
    if lacking:
        raise ValueError(f"{model} lacks weights that its config asks for, the first is {lacking[0]}")


def _load_gguf(
    path: Path, dtype: torch.dtype | None, any_family: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file into a stock model, stored as bfloat16 unless `dtype` says otherwise."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("reading .gguf needs the package gguf: pip install 'compresso-llm[gguf]'") from None
    from transformers import GgufConfig

    where, name = str(path.parent), path.name
    try:
        reader = GGUFReader(path)
        config = AutoConfig.from_pretrained(where, gguf_file=name)
    except Exception as error:  # the parser meets a torn file with whatever numpy or struct raise
        raise ValueError(f"{path} cannot be read as GGUF: {first_line(error)}") from error
    if not any_family:
        family_of(config.model_type)
    scaled = [key for key in reader.fields if ".rope.scaling." in key]
    if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(
            f"{path} scales its rotary positions ({scaled[0] if scaled else 'rope_freqs.weight'}), which transformers "
            "drops when it reads GGUF; use the safetensors checkpoint of this model"
        )
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            raw, info = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as GGUF: {first_line(error)}") from error
    _refuse_incomplete(str(path), info)
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {key: value for key, value in raw.config.to_dict().items() if key not in dropped}
    settings["rms_norm_eps"] = float(f"{raw.config.rms_norm_eps:.6g}")  # GGUF keeps it in float32
    clean = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(clean)]
    state = raw.state_dict()
    model = model_class.from_pretrained(None, config=clean, state_dict=state, dtype=dtype or torch.bfloat16)
    model.generation_config = copy.deepcopy(raw.generation_config)
    return model.eval(), tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return hub.fetch(model, lambda: AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    except hub.Unavailable:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"the tokenizer of {model} cannot be loaded: {first_line(error)}") from error


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert the parameters in place; buffers (rotary frequencies) keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: CollaborativePrompt,
    folder: Path,
    card: str,
) -> None:
    """Write a folder that loads elsewhere; it appears under its name only when it is whole.

    Raises OSError if the disk does not take it.
    """

    def write_weights(partial: Path) -> None:
        model.save_pretrained(partial, max_shard_size=SHARD_SIZE)

    write(folder, model.config, tokenizer, prompt, card, write_weights)


def write(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: CollaborativePrompt,
    card: str,
    write_weights: Callable[[Path], None],
) -> None:
    """As `save`; `write_weights` puts weights and config into the folder that it is given."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config.collaborative_prompt = asdict(prompt)
    for module, file in REMOTE_CODE.items():
        for classes in module.CLASSES:
            if classes[0] is type(config):
                auto, stem = ("AutoConfig", "AutoModel", "AutoModelForCausalLM"), file.removesuffix(".py")
                config.auto_map = {name: f"{stem}.{c.__name__}" for name, c in zip(auto, classes, strict=True)}
                shutil.copyfile(str(module.__file__), partial / file)
    write_weights(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def prompt_of(config: PreTrainedConfig) -> CollaborativePrompt | None:
    """The collaborative prompt that travels with a checkpoint."""
    stored = getattr(config, "collaborative_prompt", None)
    if stored is None:
        return None
    try:
        return CollaborativePrompt(**stored)
    except TypeError as error:
        raise ValueError(f"collaborative_prompt in config.json must have name, body and format: {error}") from error


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def model_card(
    model: PreTrainedModel, base: str, prompt: CollaborativePrompt, facts: dict[str, str], loading: str = ""
) -> str:
    """README.md of a checkpoint: what was removed and how to load it (`loading`, where it is not by transformers)."""
    per_layer_widths = model.config.model_type.startswith(PER_LAYER_PREFIX)
    trust = ", trust_remote_code=True" if per_layer_widths else ""
    shape = describe(model)
    rows = "\n".join(
        f"| {i} | {layer.num_key_value_heads * layer.queries_per_group} | {layer.num_key_value_heads} "
        f"| {layer.intermediate_size} |"
        for i, layer in enumerate(shape.layers)
    )
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    code = REMOTE_CODE[per_layer]
    note = (
        f"The layers differ in width, so the folder carries `{code}` (short, readable, the same for every model). With "
        "`import compresso` beforehand, `trust_remote_code` is not needed."
        if per_layer_widths
        else "It is a stock checkpoint; no code of ours is needed."
    )
    loading = (
        loading
        or f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its hub id
model = AutoModelForCausalLM.from_pretrained(folder{trust})
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
```

{note}"""
    )
    prompting = (
        f"It was trained with the collaborative prompt `{prompt.name}` ({prompt.format} placement), which is stored "
        "in `config.json` under `collaborative_prompt`; `compresso chat` uses it by itself. As a system turn:\n\n"
        f"```text\n{prompt.system}\n```"
        if prompt.body
        else "It was trained without a collaborative prompt."
    )
    return f"""---
library_name: transformers
tags: [pruned, compresso]
---
# {demo.MODEL_NAME if base == "demo" else Path(base).name} pruned by Compresso

{listed}

## Load

{loading}

## Prompt

{prompting}

## Widths

Hidden size {shape.hidden_size}.

| layer | query heads | key/value heads | FFN channels |
|---|---|---|---|
{rows}
"""
