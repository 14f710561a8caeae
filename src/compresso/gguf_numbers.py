"""Number formats of a GGUF file: which one a tensor gets, and its numbers in it.

K-quants are made by llama.cpp's own quantiser, which the package xllamacpp carries; the others by the package gguf.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Number
from gguf import LlamaFileType

from compresso.config import nearest

BLOCK, K_BLOCK = 32, 256  # columns that q8_0 and a K-quant take together


@dataclass(frozen=True)
class Mix:
    """What a file's matrices are stored as: most of them, and those that matter more."""

    file_type: LlamaFileType
    number: Number
    better: Number


MIXES: dict[str, Mix] = {
    "f32": Mix(LlamaFileType.ALL_F32, Number.F32, Number.F32),
    "f16": Mix(LlamaFileType.MOSTLY_F16, Number.F16, Number.F16),
    "bf16": Mix(LlamaFileType.MOSTLY_BF16, Number.BF16, Number.BF16),
    "q8_0": Mix(LlamaFileType.MOSTLY_Q8_0, Number.Q8_0, Number.Q8_0),
    "q6_k": Mix(LlamaFileType.MOSTLY_Q6_K, Number.Q6_K, Number.Q6_K),
    "q5_k_m": Mix(LlamaFileType.MOSTLY_Q5_K_M, Number.Q5_K, Number.Q6_K),
    "q4_k_m": Mix(LlamaFileType.MOSTLY_Q4_K_M, Number.Q4_K, Number.Q6_K),
}
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
INSTEAD = {Number.Q4_K: Number.Q5_0, Number.Q5_K: Number.Q5_1, Number.Q6_K: Number.Q8_0}
"""For rows that are no multiple of 256, as llama.cpp chooses; rows that are none of 32 become f16."""


def number_of(name: str, size: tuple[int, ...], mix: Mix, layers: int, tied: bool) -> Number:
    """The format of one tensor, by llama.cpp's rules for a mix: norms, biases, routers stay f32; the head, and half of
    value and down matrices (the first and last eighth of the layers, every third between), get the better one."""
    if len(size) == 1 or ".ffn_gate_inp." in name:
        return Number.F32
    part = name.split(".")
    number = mix.number
    if part[0] == ("token_embd" if tied else "output"):
        number = mix.better
    elif part[0] == "blk" and part[2] in ("attn_v", "ffn_down", "ffn_down_exps"):
        i, eighth = int(part[1]), layers // 8
        if i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2:
            number = mix.better
    if number in INSTEAD and size[-1] % K_BLOCK:
        number = INSTEAD[number]
    if size[-1] % gguf.GGML_QUANT_SIZES[number][0]:
        number = Number.F16
    return number


def fitting(width: int, hidden_size: int, mix: Mix) -> int:
    """The FFN width, with zero channels added, whose three matrices take the least room.

    A row that is no multiple of a format's block is stored in a larger format, or in half precision. Formats without
    blocks get a multiple of 32 as well where that adds a sixteenth at most: llama.cpp takes what is left over of a row
    number by number, a third of the prompt's speed (LOG.md, 2026-11-26).
    """

    def bits(columns: int) -> float:
        block, size = gguf.GGML_QUANT_SIZES[number_of("blk.0.ffn_gate", (1, columns), mix, 1, False)]
        return 8 * size / block

    def room(padded: int) -> float:
        return padded * (bits(padded) + 2 * bits(hidden_size))

    filled = {grain: -(-width // grain) * grain for grain in (1, BLOCK, K_BLOCK)}
    if gguf.GGML_QUANT_SIZES[mix.number][0] == 1:
        return filled[BLOCK] if 16 * (filled[BLOCK] - width) <= width else width
    return min(filled.values(), key=room)


def encode(array: np.ndarray, number: Number) -> np.ndarray:
    """An array (..., rows, columns) of float32 in another format, as bytes where it is quantised.

    Raises ValueError if a K-quant is asked for and xllamacpp is not there.
    """
    if number in INSTEAD:
        return _by_llama_cpp(array, number)
    return gguf.quantize(array, number)


def check(kind: str) -> None:
    """Raise ValueError if matrices cannot be written as this kind here."""
    if kind not in MIXES:
        raise ValueError(f"unknown number format {kind!r}{nearest(kind, MIXES)}; formats are {', '.join(MIXES)}")
    if kind in K_QUANTS:
        _quantiser()


@cache
def _quantiser() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise ValueError(
            "K-quants are made by llama.cpp's quantiser: pip install xllamacpp; or export --type f16, and run "
            "`llama-quantize model.gguf smaller.gguf Q4_K_M` of llama.cpp"
        ) from None
    library = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointers = (ctypes.c_void_p, ctypes.c_void_p)
    function.argtypes = (ctypes.c_int, *pointers, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return function


def _by_llama_cpp(array: np.ndarray, number: Number) -> np.ndarray:
    *stacked, columns = array.shape
    rows = int(np.prod(stacked))
    block, size = gguf.GGML_QUANT_SIZES[number]
    source = np.ascontiguousarray(array, np.float32)
    out = np.empty((rows, columns // block * size), np.uint8)
    written = _quantiser()(int(number), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out.reshape(*stacked, -1)
