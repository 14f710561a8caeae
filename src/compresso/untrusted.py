"""What a checkpoint folder must be before anything of it is loaded: its files may come from anyone.

Only names, sizes, JSON and the headers of safetensors files are read, never a weight, so that the largest checkpoint
takes a moment. What passes asks for no more memory than its files account for, and names nothing outside its folder.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
MB = 2**20
LARGEST_FILES = {
    **dict.fromkeys(("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"), 64 * MB),
    **dict.fromkeys((INDEX, "tokenizer_config.json", "added_tokens.json"), 16 * MB),
    **dict.fromkeys(("config.json", "special_tokens_map.json"), 4 * MB),
    **dict.fromkeys(("generation_config.json", "adapter_config.json", "*.jinja"), MB),
}
"""Bytes of what a parser reads as a whole. The largest known have half of it."""
MOST_GROWTH = 64  # characters that a tokenizer may make of one
LONGEST_POST_PROCESSOR = 100_000  # characters of its description
LARGEST_HEADER = 16 * MB  # of a safetensors file; a hundred thousand tensors
DEEPEST = 50  # levels of a config.json
SIZES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_hidden_size"), 2**20),
    **dict.fromkeys(("n_embd", "d_model", "n_inner", "d_ff"), 2**20),
    **dict.fromkeys(
        ("vocab_size", "max_position_embeddings", "original_max_position_embeddings", "prefill_chunk_size"), 2**31
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2**11),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 2**14),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 64),
    **dict.fromkeys(("head_dim", "num_labels", "num_experts", "num_local_experts", "n_routed_experts"), 2**14),
}
"""Whole numbers from 1 (of experts from 0) to this; the largest known models stay far below."""
AMOUNTS = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (0.0, 1.0)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (1e-3, 1e15)),
    **dict.fromkeys(("attention_dropout", "initializer_range"), (0.0, 1e3)),
}
"""Finite numbers from and to."""
PACKED = 16  # numbers that one stored number of a quantised checkpoint may stand for
ROOM = 2  # times what the files hold: beyond it a config is refused before anything is allocated
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""Of a number in a safetensors file."""


def check_folder(folder: Path) -> int:
    """Look at every file of a checkpoint that something will parse; how many numbers its safetensors hold.

    Raises ValueError for files that no checkpoint has, names that lead out of the folder, and headers that lie.
    """
    check_texts(folder)
    for file in sorted(folder.glob("*.safetensors")):
        check_file(file, folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has an adapter_config.json, which names another model to load instead. Merge the adapter into "
            "its model first; if the weights here are whole, delete that file"
        )
    if (folder / INDEX).exists():
        check_index(folder)
    held: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        held |= {name: math.prod(shape) for name, shape in read_header(file).items()}
    return sum(held.values())


def _largest(file: Path) -> int | None:
    """Bytes that a file of this name may have; None for one that nothing parses as a whole."""
    return next((size for pattern, size in LARGEST_FILES.items() if file.match(pattern)), None)


def check_texts(folder: Path) -> None:
    """Raise ValueError for a config, a tokenizer or a template that no parser should be given."""
    for pattern in LARGEST_FILES:
        for file in [*folder.glob(pattern), *folder.glob(f"additional_chat_templates/{pattern}")]:
            check_file(file, folder)
    if (folder / "generation_config.json").is_file():
        check_config(read_json(folder / "generation_config.json"), folder / "generation_config.json")
    if (folder / "tokenizer.json").is_file():
        check_tokenizer(folder / "tokenizer.json")


def check_file(file: Path, folder: Path) -> None:
    """Raise ValueError unless it is a plain file in the folder, or in the hub's cache, and no larger than its kind."""
    try:
        about, place = file.stat(), file.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); download it again") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{file} is no plain file, expected one; do not use this checkpoint")
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"  # of the hub's cache, which links to them
    if not place.is_relative_to(home) and not (home.parent.name == "snapshots" and place.is_relative_to(blobs)):
        raise ValueError(f"{file} is a link that leads out of its folder, to {place}; if you trust it, copy it there")
    largest = _largest(file)
    if largest is not None and about.st_size > largest:
        raise ValueError(
            f"{file} has {about.st_size / MB:,.0f} MB, expected at most {largest // MB}; it is damaged, or meant to do "
            "harm"
        )


def check_tokenizer(file: Path) -> None:
    """Raise ValueError for a tokenizer.json that makes a long text of a short one."""
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it holds {type(settings).__name__}, expected an object")
    added = len(json.dumps(settings.get("post_processor")))
    growth = max(_growth(settings.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder"))
    if growth > MOST_GROWTH or added > LONGEST_POST_PROCESSOR:
        raise ValueError(
            f"{file} makes each character up to {growth:,}, or adds {added:,} to a text, expected at most "
            f"{MOST_GROWTH} and {LONGEST_POST_PROCESSOR:,}; it is damaged, or meant to do harm"
        )


def _growth(part: Any) -> int:
    """How many characters a step of a tokenizer, or several one after the other, may put in the place of one."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    own = max(len(str(part.get("content", ""))), len(str(part.get("prepend", ""))) + 1)
    return own * math.prod(_growth(part.get(inner)) for inner in ("normalizers", "pretokenizers", "decoders"))


def check_index(folder: Path) -> None:
    """Raise ValueError unless the index names safetensors files of its own folder, and these are there."""
    where = folder / INDEX
    index = read_json(where)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{where} has no weight_map from tensors to files; download it again")
    for name in sorted(set(map(str, names.values()))):
        if not name.endswith(".safetensors") or name != os.path.basename(name) or "\\" in name or "\0" in name:
            raise ValueError(
                f"{where} names {name[:80]!r}, expected a *.safetensors file in the same folder; weights are read from "
                "no other place and in no other form"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{where} names {name[:80]!r}, which is missing; download the checkpoint again")


def read_json(file: Path) -> Any:
    """Raises ValueError for what is no JSON, or too deep."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {str(error)[:200]}") from None


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, by name, read from its header alone.

    Raises ValueError unless the tensors fill the file exactly, one after the other.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(opened.read(length), object_pairs_hook=_once)
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
        entries.pop("__metadata__", None)
        spans = sorted(_span(name, entry) for name, entry in entries.items())
        end = 0
        for begin, stop, name in spans:
            if begin != end:
                raise ValueError(f"{name[:80]!r} begins at {begin}, expected {end}")
            end = stop
        if end != size - 8 - length:
            raise ValueError(f"the tensors take {end} bytes, and {size - 8 - length} are there")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be loaded: {str(error)[:200]}; download it again") from None
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header names a tensor twice")
    return found


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor begins and ends. Raises ValueError unless its shape and numbers take just that room."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = str(fields.get("dtype")), fields.get("shape", ()), fields.get("data_offsets", ())
    if dtype not in BITS or not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"{name[:80]!r} is {str(entry)[:80]}, expected a dtype, a shape and two offsets")
    needed = -(-math.prod(shape) * BITS[dtype] // 8)
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{name[:80]!r} of shape {shape} takes {needed} bytes, and has {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1], name


def _counts(given: Any) -> bool:
    return isinstance(given, list) and all(type(n) is int and 0 <= n < 2**48 for n in given)


def check_config(settings: Any, where: str | Path) -> None:
    """Raise ValueError for a config whose sizes are no sizes of a model, or that names code or files to load."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is damaged: it holds {type(settings).__name__}, expected an object")
    for key, value in _walk(settings, where, 0):
        numbers = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
        least = 0 if isinstance(value, list) or "expert" in key else 1  # of layers, some may lack a part
        if key in SIZES and not all(type(one) is int and least <= one <= SIZES[key] for one in numbers):
            expected = f"a whole number from 1 to {SIZES[key]:,}; the file is damaged, or of no model"
        elif key in AMOUNTS and not all(_lies(one, *AMOUNTS[key]) for one in numbers):
            expected = "a number from {:g} to {:g}; the file is damaged, or of no model".format(*AMOUNTS[key])
        elif key.endswith(("attn_implementation", "experts_implementation")) and _leads_elsewhere(value):
            expected = "a name without a slash: it would fetch code from the hub and run it; delete the line"
        elif key == "transformers_weights" and value not in (None, INDEX, "model.safetensors"):
            expected = "model.safetensors; delete the line"
        else:
            continue
        raise ValueError(f"{where}: {key} is {str(value)[:80]!r}, expected {expected}")


def _lies(number: Any, least: float, most: float) -> bool:
    return type(number) in (int, float) and least <= number <= most


def _walk(part: dict[str, Any], where: str | Path, depth: int) -> Iterator[tuple[str, Any]]:
    """Every entry of nested objects."""
    if depth > DEEPEST:
        raise ValueError(f"{where} is damaged: objects within objects more than {DEEPEST} levels deep")
    for key, value in part.items():
        yield key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _walk(inner, where, depth + 1)


def _leads_elsewhere(value: Any) -> bool:
    return any("/" in str(name) for name in (value.values() if isinstance(value, dict) else [value]))


def check_count(asked: int, held: int, quantised: bool, where: str | Path) -> None:
    """Raise ValueError for a model of far more parameters than the files hold numbers: it must not be allocated."""
    if asked > ROOM * held * (PACKED if quantised else 1):
        raise ValueError(
            f"the config of {where} asks for {asked:,} parameters, and its files hold {held:,} numbers; it is of "
            "another model, or files are missing"
        )
