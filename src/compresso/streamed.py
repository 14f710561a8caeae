"""Extraction from files to files, one tensor at a time: for checkpoints that do not fit in memory.

The smaller model exists only as shapes on the meta device; its weights go from the
shards of the old checkpoint straight to their place in those of the new one.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from compresso import checkpoint, untrusted
from compresso import plan as plans
from compresso.adapters import Adapter
from compresso.cutting import cut_weights
from compresso.extract import check_fit, smaller_config
from compresso.families import Family, family_of, renamed, tensors_in_files
from compresso.mixtures import Sorted
from compresso.plan import Plan
from compresso.prompts import CollaborativePrompt, find_prompt
from compresso.shape import count_prunable, describe
from compresso.unfused import UNFUSED
from compresso.untrusted import INDEX
from compresso.workbench import progress_bar

SHARD_BYTES = 5_000_000_000
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a folder's *.safetensors by name, each read when it is asked for.

    Raises ValueError for a file that is damaged, and where an index names one that is missing.
    """

    def __init__(self, folder: Path, family: Family | None = None):
        """Of a family whose files call tensors otherwise, they go by the model's names here, experts in stacks."""
        self._file: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        self._stacks: dict[str, list[list[str]]] = {}
        try:
            if (folder / INDEX).is_file():
                names = untrusted.read_json(folder / INDEX)["weight_map"]
                files = sorted({folder / name for name in names.values()})
            else:
                files = sorted(folder.glob("*.safetensors"))
            for file in files:
                with safe_open(file, "pt") as stored:
                    self._file |= dict.fromkeys(stored.keys(), file)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(f"the weights in {folder} cannot be read: {checkpoint.first_line(error)}") from error
        self._names = dict.fromkeys(self._file)
        for own, other in family.stored_names if family else ():
            for name in [name for name in self._file if renamed(name, other, own) != name]:
                del self._names[name]
                self._stored[renamed(name, other, own)] = name
        for own, parts in family.stored_experts if family else ():
            for name in [name for name in self._file if name.endswith(parts[0].format(0))]:
                layer = name.removesuffix(parts[0].format(0))
                of_experts = ([layer + part.format(i) for part in parts] for i in itertools.count())
                whole = itertools.takewhile(lambda names: self._file.keys() >= set(names), of_experts)
                self._stacks[layer + own] = list(whole)
        self._names |= dict.fromkeys((*self._stored, *self._stacks))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._stacks:
            return self._read(self._stored.get(name, name))
        return torch.stack([torch.cat([self._read(part) for part in parts]) for parts in self._stacks[name]])

    def missing(self, model: PreTrainedModel) -> list[str]:
        """Tensors that files of this model hold, and these do not; of tied ones the first counts."""
        model_type = model.config.model_type
        parameters = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        parts = (part for name, shape in parameters for part, _ in tensors_in_files(model_type, name, shape))
        return [part for part in parts if part not in self._file]

    def _read(self, name: str) -> Tensor:
        with safe_open(self._file[name], "pt") as stored:  # opened anew, so that no page of it stays mapped
            return stored.get_tensor(name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first weight; those of a checkpoint that have another one, as some norms do, get it when they are
        loaded."""
        name = next(name for name in self._file if name.endswith(".weight"))
        with safe_open(self._file[name], "pt") as stored:
            return stored.get_slice(name)[:0].dtype

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MergedWeights(Mapping[str, Tensor]):
    """Weights with adapters folded in, each when it is asked for: W + scale B A, added in float32."""

    def __init__(self, weights: Mapping[str, Tensor], adapters: dict[str, Adapter]):
        self._weights, self._adapters = weights, adapters

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if name not in self._adapters:
            return weight
        down, up, scale = self._adapters[name]
        return weight.float().addmm_(up.float(), down.float(), alpha=scale).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def extract_files(model: str, run: str | Path, output: str | Path) -> dict[str, Any]:
    """Apply the plan of a run folder to a checkpoint on disk and write the smaller one; the facts of its card.

    `model` is a folder with safetensors or a hub id. Memory holds one tensor at a time. Raises ValueError or
    FileNotFoundError for a checkpoint that cannot be read, a plan for another shape, or an output that exists.
    """
    folder, plan = Path(output), plans.load(Path(run))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another --output")
    return write_cut(folder_of(model), plan, folder, None, model)


def refuse_fused(model: str, model_type: str) -> None:
    """Raise ValueError for a family whose matrices are taken apart when it is loaded."""
    if model_type in UNFUSED:
        raise ValueError(
            f"{model} is a {model_type}, which is taken apart when it is loaded whole; reading it from file to file "
            "(--sharded, --precision 4bit, `compresso extract`) is not possible"
        )


def folder_of(model: str) -> Path:
    """The folder of a checkpoint's safetensors, fetched from the hub if need be. Raises as `checkpoint.find`."""
    if model.endswith(".gguf") or model == "demo":
        raise ValueError(
            f"{model} is no folder with safetensors; `compresso prune` reads it in one process, and writes one"
        )
    place = Path(checkpoint.find(model))
    refuse_fused(model, AutoConfig.from_pretrained(str(place), trust_remote_code=False).model_type)
    return checkpoint.fetched(str(place))


def write_cut(
    place: Path,
    plan: Plan | None,
    folder: Path,
    prompt: CollaborativePrompt | None,
    base: str,
    adapters: dict[str, Adapter] | None = None,
) -> dict[str, Any]:
    """Write the smaller one of the checkpoint in `place`, adapters merged first, as `folder`; the facts of its card.

    Without a plan nothing is cut, and without a prompt it keeps the one that it carries, or none. `adapters` goes by
    the names of weights; `base` is what the card calls the model.
    """
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    whole = shapes_of(config)
    shape = describe(whole)
    plan = plan or Plan(shape, shape.open_gates())
    check_fit(plan, shape, family_of(config.model_type))
    old, tokenizer = read_weights(place, whole), checkpoint.load_tokenizer(str(place))
    form = "chat" if tokenizer.chat_template else "alpaca"
    prompt = prompt or checkpoint.prompt_of(config) or find_prompt("none", form)
    dtype = StoredWeights(place).dtype
    smaller = shapes_of(smaller_config(config, old, plan))
    facts = {
        "base model": base,
        "parameters": f"{_count(whole):,} before, {_count(smaller):,} after",
        "sparsity": f"{100 * plan.sparsity:.2f} % of the decoder layers' matrices removed",
    }

    def write_weights(partial: Path) -> None:
        smaller.config.architectures = [type(smaller).__name__]
        smaller.config.dtype = dtype
        smaller.config.save_pretrained(partial)
        if (place / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(place).save_pretrained(partial)
        with progress_bar() as bar:
            task = bar.add_task("extract", total=len(stored_names(smaller)), note="")
            weights = cut_weights(MergedWeights(old, adapters or {}), config.model_type, plan)
            write_shards(partial, smaller, weights, lambda: bar.advance(task))

    card = checkpoint.model_card(smaller, base, prompt, facts)
    checkpoint.write(folder, smaller.config, tokenizer, prompt, card, write_weights)
    return {**facts, "prunable_parameters": count_prunable(smaller), "bytes": checkpoint.weight_bytes(folder)}


def read_weights(place: Path, model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The weights in a folder, those of experts in order. Raises ValueError if some of `model`'s are missing."""
    family = family_of(model.config.model_type)
    found = StoredWeights(place, family)
    if missing := found.missing(model):
        raise ValueError(f"the weights in {place} lack {missing[0]} and {len(missing) - 1} more")
    return Sorted(found, family) if family.router else found


def shapes_of(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config on the meta device, in its dtype or another: shapes without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model of a config, however its weights are held."""
    return _count(shapes_of(config))


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stored_names(model: PreTrainedModel) -> list[str]:
    """Parameters that a checkpoint holds: of tied ones only the first."""
    return [name for name, _ in model.named_parameters()]


def write_shards(
    folder: Path, model: PreTrainedModel, weights: Iterator[tuple[str, Tensor]], advance: Callable[[], None]
) -> None:
    """Write `weights` as the safetensors files of `model`, whose parameters give names and shapes.

    Raises RuntimeError if the weights are not those of the model: that would be our mistake.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    dtype, shards = model.config.dtype, _shards(model)
    stored = {name: tensors_in_files(model.config.model_type, name, shape) for name, shape in shapes.items()}
    places: dict[str, tuple[int, int]] = {}
    for number, shard in enumerate(shards, 1):
        places |= {name: (number, begin) for name, begin in shard.items()}
    names = {number: _file_name(number, len(shards)) for number in range(1, len(shards) + 1)}
    files: dict[int, BinaryIO] = {}
    written = set()
    try:
        for number, shard in enumerate(shards, 1):
            files[number] = (folder / names[number]).open("wb")
            files[number].write(_header(shard, dtype, stored))
        starts = {number: file.tell() for number, file in files.items()}
        for name, tensor in weights:
            if name not in places:  # a head that is tied
                continue
            if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
                raise RuntimeError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shapes[name]} {dtype}")
            number, begin = places[name]
            files[number].seek(starts[number] + begin)
            files[number].write(tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
            written.add(name)
            advance()
    finally:
        for file in files.values():
            file.close()
    if missing := shapes.keys() - written:
        raise RuntimeError(f"the cut weights lack {sorted(missing)}")
    if len(shards) > 1:
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        weight_map = {part: names[number] for name, (number, _) in places.items() for part, _ in stored[name]}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(model: PreTrainedModel) -> list[dict[str, int]]:
    """Where each tensor begins in which file, files filled in order."""
    shards: list[dict[str, int]] = [{}]
    end = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * model.config.dtype.itemsize
        if shards[-1] and end + size > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = end
        end += size
    return shards


def _file_name(number: int, of: int) -> str:
    return "model.safetensors" if of == 1 else f"model-{number:05}-of-{of:05}.safetensors"


def _header(shard: dict[str, int], dtype: torch.dtype, stored: dict[str, list[tuple[str, tuple[int, ...]]]]) -> bytes:
    """The beginning of a safetensors file: its length, then JSON, padded with spaces to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, begin in shard.items():
        for part, shape in stored[name]:
            end = begin + math.prod(shape) * dtype.itemsize
            entries[part] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
            begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
