"""The header of a GGUF file, read before any library does: counts, lengths and places that the file does not have.

The format is that of ggml's docs/gguf.md: magic, version, two counts, then keys with values, then tensors with shapes.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from compresso.untrusted import MB, check_config

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 256 * MB  # half a million tokens and merges take a tenth of it
MOST_ENTRIES = 1_000_000  # of an array; no vocabulary is larger
MOST_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {10: "<Q", 11: "<q", 12: "<d"}
KEYS = {
    **{"block_count": "num_hidden_layers", "embedding_length": "hidden_size", "vocab_size": "vocab_size"},
    **{"feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads"},
    **{"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"},
    **{"context_length": "max_position_embeddings", "attention.layer_norm_rms_epsilon": "rms_norm_eps"},
    **{"rope.freq_base": "rope_theta"},
}
"""Which entry of a config a key, after the name of its architecture, becomes."""


class _Reader:
    """What comes next in a file; nothing is read that the file, or a sane header, does not have."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, min(size, LARGEST_HEADER)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{count} bytes are named in its header, and {self.left} can be there")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def value(self, kind: int, depth: int = 0) -> Any:
        """A number, a text, or the entries of an array; large arrays of numbers are passed over."""
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY or depth:
            raise ValueError(f"a value of kind {kind} where there is none")
        inner, count = self.number("<I"), self.number("<Q")
        if count > MOST_ENTRIES:
            raise ValueError(f"an array of {count} entries, expected at most {MOST_ENTRIES}")
        if inner in SCALARS:
            form = f"<{count}{SCALARS[inner][1]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        return [self.value(inner, depth + 1) for _ in range(count)]


def check(path: Path, sizes: dict[int, tuple[int, int]]) -> tuple[list[str], int]:
    """Names of the entries and tensors of a GGUF file, and how many numbers the tensors hold.

    `sizes` tells numbers and bytes of a block of each kind. Raises ValueError, naming the file, for a header that it
    cannot have.
    """
    try:
        with path.open("rb") as file:
            return _check(file, path.stat().st_size, sizes, path)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}; download it again") from None


def _check(file: BinaryIO, size: int, sizes: dict[int, tuple[int, int]], path: Path) -> tuple[list[str], int]:
    where = f"{path} cannot be read as GGUF"
    if file.read(4) != MAGIC:
        raise ValueError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    reader = _Reader(file, size - 4)
    try:
        version, tensors, entries = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, expected {' or '.join(map(str, VERSIONS))}, little-endian")
        if max(tensors, entries) > MOST_ENTRIES:
            raise ValueError(f"{tensors} tensors and {entries} entries, expected at most {MOST_ENTRIES}")
        found: dict[bytes, Any] = {}
        for _ in range(entries):
            key = reader.text()
            if key in found:
                raise ValueError(f"the entry {key[:80]!r} is there twice")
            found[key] = reader.value(reader.number("<I"))
        spans, held = [], 0
        for _ in range(tensors):
            name, dimensions = reader.text(), reader.number("<I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"the tensor {name[:80]!r} has {dimensions} dimensions")
            shape = [reader.number("<Q") for _ in range(dimensions)]
            kind, offset = reader.number("<I"), reader.number("<Q")
            if kind not in sizes:
                raise ValueError(f"the tensor {name[:80]!r} has numbers of kind {kind}, which is unknown")
            count, (block, width) = math.prod(shape), sizes[kind]
            if count % block:
                raise ValueError(f"the tensor {name[:80]!r} has {count} numbers, no multiple of {block}")
            spans.append((offset, offset + count // block * width, name))
            held += count
        alignment = found.get(b"general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise ValueError(f"general.alignment is {str(alignment)[:40]}, expected a small whole number")
        start = -(-file.tell() // alignment) * alignment
        end = 0
        for begin, stop, name in sorted(spans):
            if begin < end or start + stop > size:
                raise ValueError(f"the tensor {name[:80]!r} lies outside the file, or over another one")
            end = stop
    except ValueError as error:
        raise ValueError(f"{where}: {error}; download it again") from None
    check_config(_settings(found), path)
    return [name.decode("utf-8", "replace") for name in (*found, *(name for _, _, name in spans))], held


def _settings(found: dict[bytes, Any]) -> dict[str, Any]:
    """What becomes the config, under its names there."""
    architecture = found.get(b"general.architecture", b"")
    prefix = architecture.decode() + "." if isinstance(architecture, bytes) else ""
    entries = {key.decode().removeprefix(prefix): value for key, value in found.items()}
    return {name: entries[key] for key, name in KEYS.items() if key in entries}
