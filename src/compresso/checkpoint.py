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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from compresso import demo, gguf_header, hub, nemotron_nas, per_layer, untrusted, whole_files
from compresso.config import nearest_path
from compresso.families import FAMILIES, PER_LAYER_PREFIX, family_of
from compresso.mixtures import sort_channels
from compresso.prompts import CollaborativePrompt
from compresso.shape import check_config, describe, main_rope
from compresso.unfused import UNFUSED

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
REMOTE_CODE = {per_layer: "modeling_compresso.py", nemotron_nas: "modeling_decilm.py"}
"""What files of classes are called in a checkpoint that they travel with."""
SHARD_SIZE = "5GB"
LONGEST_PROMPT = 100_000  # characters


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
        config, parameters = read_config(model)
    except hub.Unavailable as error:
        raise hub.Unavailable(f"no folder {model!r}{nearest_path(path)}, and {error}") from error
    except (OSError, HFValidationError) as error:
        raise _unreadable(model, path.is_dir(), error) from error
    if not any_family:
        _check_family(config.model_type)
        if config.model_type not in UNFUSED:
            check_config(config)
        _refuse_quantised(model, config)
    if path.is_dir():
        _check_weights(path, config, parameters)
    return model


def read_config(model: str | Path) -> tuple[PreTrainedConfig, int]:
    """The config of a folder or hub id, and how many parameters its model has, found without numbers.

    Raises ValueError if it describes no model, OSError if there is none.
    """
    found = hub.fetch(str(model), lambda: cached_file(str(model), "config.json"))
    if found is None:
        raise FileNotFoundError("it has no config.json")
    file = Path(found)
    untrusted.check_file(file, file.parent)
    untrusted.check_config(untrusted.read_json(file), file)
    try:
        config = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)  # what was looked at
        return config, _count(config)
    except Exception as error:  # whatever a model's class raises for values that it did not expect
        raise ValueError(f"{model}/config.json cannot be read: {first_line(error)}") from error


def _count(config: PreTrainedConfig) -> int:
    """Parameters of a model, found without numbers."""
    with torch.device("meta"), no_init_weights():
        shapes = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in shapes.parameters())


def _check_weights(folder: Path, config: PreTrainedConfig, parameters: int) -> None:
    """Raise ValueError for files that cannot be loaded, or that hold far less than the config asks for."""
    held = untrusted.check_folder(folder)
    untrusted.check_count(parameters, held, getattr(config, "quantization_config", None) is not None, folder)


def fetched(model: str) -> Path:
    """The folder of a checkpoint that `find` has found, from the hub if need be, checked before it is loaded."""
    if Path(model).is_dir():
        return Path(model)
    folder = _snapshot(model, "*.safetensors")
    _check_weights(folder, *read_config(folder))
    return folder


def _snapshot(model: str, *more: str) -> Path:
    """The folder of a hub id, with what a tokenizer needs and files of these names; what lies deeper stays there."""
    wanted = ["*.json", "*.model", "*.jinja", "*.txt", *more]
    unwanted = ["*/*", "consolidated*"]
    return Path(hub.fetch(model, lambda: snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted)))


def _check_family(model_type: str) -> None:
    """Raise ValueError for a model_type that is none of FAMILIES, and is not turned into one."""
    if model_type not in UNFUSED:
        family_of(model_type)


def load(
    model: str | Path, dtype: torch.dtype | None = None, any_family: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a supported family, or of any, and its tokenizer, in `dtype` or the stored one.

    Of a mixture of a supported family, the channels of each expert are put in order (`mixtures.sort_channels`), which
    plans count on. Raises FileNotFoundError or ValueError, with what was found and what to do, for
    everything that cannot be loaded.
    """
    model = find(str(model), any_family)
    if model.endswith(".gguf"):
        return _load_gguf(Path(model), dtype, any_family)
    folder = str(fetched(model))
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # what a class raises for tensors that it did not expect
        raise ValueError(f"the weights of {model} cannot be loaded: {first_line(error)}") from error
    _refuse_incomplete(model, info)
    if not any_family and loaded.config.model_type in UNFUSED:
        loaded = UNFUSED[loaded.config.model_type](loaded)
    if not any_family:
        sort_channels(loaded)
    return loaded.eval(), load_tokenizer(folder)


def _unreadable(model: str, local: bool, error: Exception) -> Exception:
    if local:
        return ValueError(f"{model}/config.json cannot be read: {first_line(error)}")
    return FileNotFoundError(
        f"no folder {model!r}{nearest_path(model)}, and the hub gave no such model ({first_line(error)}). Check the "
        "spelling, or pass a local folder, or `demo`"
    )


def first_line(error: BaseException) -> str:
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
    untrusted.check_file(folder / "config.json", folder)
    config = untrusted.read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} is damaged or names no model_type; download it again")
    if not any_family:
        _check_family(config["model_type"][:80])
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


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The config of a GGUF file, whose header is looked at first. Raises ValueError if it is none."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ValueError("reading .gguf needs the package gguf: pip install 'compresso-llm[gguf]'") from None
    names, held = gguf_header.check(path, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()})
    if any(".ffn_gate_exps." in name for name in names):
        raise ValueError(
            f"{path} holds a mixture of experts, whose widths transformers does not read off GGUF; use the safetensors "
            "checkpoint of this model"
        )
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        parameters = _count(config)
    except Exception as error:  # the parser meets a torn file with whatever numpy or struct raise
        raise ValueError(f"{path} cannot be read as GGUF: {first_line(error)}") from error
    untrusted.check_count(parameters, held, False, path)
    scaled = [name for name in names if ".rope.scaling." in name or name == "rope_freqs.weight"]
    if scaled:
        raise ValueError(
            f"{path} scales its rotary positions ({scaled[0]}), which transformers drops when it reads GGUF; use the "
            "safetensors checkpoint of this model"
        )
    return config


def _load_gguf(
    path: Path, dtype: torch.dtype | None, any_family: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file into a stock model, stored as bfloat16 unless `dtype` says otherwise."""
    from transformers import GgufConfig

    where, name = str(path.parent), path.name
    config = read_gguf_config(path)
    if not any_family:
        family_of(config.model_type)
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            raw, info = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(f"{path} cannot be read as GGUF: {first_line(error)}") from error
    _refuse_incomplete(str(path), info)
    tokenizer = _working(str(path), lambda: AutoTokenizer.from_pretrained(where, gguf_file=name))
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {key: value for key, value in raw.config.to_dict().items() if key not in dropped}
    settings["rms_norm_eps"] = float(f"{raw.config.rms_norm_eps:.6g}")  # GGUF keeps it in float32
    clean = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(clean)]
    state = raw.state_dict()
    model = model_class.from_pretrained(None, config=clean, state_dict=state, dtype=dtype or torch.bfloat16)
    model.generation_config = copy.deepcopy(raw.generation_config)
    if not any_family:
        sort_channels(model)
    return model.eval(), tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises ValueError if its files are none, OSError if there are none."""
    folder = Path(model) if Path(model).is_dir() else _snapshot(model)
    untrusted.check_texts(folder)
    return _working(model, lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _working(model: str, load: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, tried on a text. Raises ValueError if that fails."""
    try:
        tokenizer = load()
        tokenizer.decode(tokenizer("A try.")["input_ids"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics that are none
        raise ValueError(f"the tokenizer of {model} cannot be loaded: {first_line(error)}") from error
    return tokenizer


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
    config.collaborative_prompt = asdict(prompt)
    with whole_files.new_folder(folder) as partial:
        for module, file in REMOTE_CODE.items():
            for classes in module.CLASSES:
                if classes[0] is type(config):
                    auto, stem = ("AutoConfig", "AutoModel", "AutoModelForCausalLM"), file.removesuffix(".py")
                    config.auto_map = {name: f"{stem}.{c.__name__}" for name, c in zip(auto, classes, strict=True)}
                    shutil.copyfile(str(module.__file__), partial / file)
        write_weights(partial)
        _add_older_names(partial, config)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _add_older_names(folder: Path, config: PreTrainedConfig) -> None:
    """Tell in config.json by their older names too what transformers 5 calls otherwise: readers that look for these,
    as MLX does, compute something else without a word where they take a default for rope_theta."""
    path = folder / "config.json"
    settings = json.loads(path.read_bytes())
    family = FAMILIES.get(config.model_type.removeprefix(PER_LAYER_PREFIX))
    if family and family.num_experts and family.num_experts in config.attribute_map:
        settings[family.num_experts] = getattr(config, family.num_experts)
    rope = main_rope(config)
    older = {"rope_theta": rope.get("rope_theta")}
    if local := (settings.get("rope_parameters") or {}).get("sliding_attention"):  # Gemma 3
        older["rope_local_base_freq"] = local["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if config.model_type.endswith("gpt_neox"):
        older |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    settings |= {name: value for name, value in older.items() if value is not None}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def prompt_of(config: PreTrainedConfig) -> CollaborativePrompt | None:
    """The collaborative prompt that travels with a checkpoint."""
    stored = getattr(config, "collaborative_prompt", None)
    if stored is None:
        return None
    texts = stored if isinstance(stored, dict) and set(stored) == {"name", "body", "format"} else {}
    if not texts or any(not isinstance(text, str) or len(text) > LONGEST_PROMPT for text in texts.values()):
        raise ValueError(
            "collaborative_prompt in config.json must have name, body and format, texts of at most "
            f"{LONGEST_PROMPT:,} characters; delete the entry to go without one"
        )
    return CollaborativePrompt(**texts)


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
    columns = {"num_attention_heads": "query heads", "num_key_value_heads": "key/value heads"}
    columns |= {"intermediate_size": "FFN channels", "num_experts": "experts"}
    shown = [key for key in columns if key in shape.layers[0].widths]
    table = [["layer", *(columns[key] for key in shown)], ["---"] * (1 + len(shown))]
    table += [[str(i), *(str(layer.widths[key]) for key in shown)] for i, layer in enumerate(shape.layers)]
    separators = ["|".join(row) if "---" in row else f" {' | '.join(row)} " for row in table]
    rows = "\n".join(f"|{row}|" for row in separators)
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

{rows}
"""
