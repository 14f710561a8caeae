"""A model as an ONNX graph with a key/value cache, for onnxruntime and what is built on it.

Inputs: input_ids, attention_mask, position_ids, and past.N.key and past.N.value of every layer N with attention (of no
tokens at the start). Outputs: logits, and present.N.key and present.N.value to be passed on.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from compresso.prefix import with_cache
from compresso.shape import describe

Past = list[tuple[Tensor, Tensor]]
NAMES = ("input_ids", "attention_mask", "position_ids")
DYNAMIC = torch.export.Dim.DYNAMIC


class _WithPast(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past) -> Any:
        cache = DynamicCache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits = self.model(**given, **with_cache(self.model, cache)).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


def check() -> None:
    """Raise ValueError if the packages for it are not there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; install them: pip install 'compresso-llm[onnx]'") from None


@torch.no_grad()
def write(model: PreTrainedModel, path: Path) -> None:
    """Write the graph; weights beyond ONNX's 2 GB go into a file beside it."""
    check()
    wrapped = _WithPast(model.cpu().eval())
    past = no_past(model, rows=2, tokens=3)
    ids = torch.ones(2, 5, dtype=torch.long)
    given = (ids, torch.ones(2, 8, dtype=torch.long), torch.arange(3, 8).expand(2, -1), past)
    per_row = {0: DYNAMIC, 1: DYNAMIC}
    per_past = {0: DYNAMIC, 2: DYNAMIC}
    parts = [f"{i}.{what}" for i in range(len(past)) for what in ("key", "value")]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # its progress is for its developers
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            wrapped,
            given,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(per_row, per_row, per_row, [(per_past, per_past) for _ in past]),
            input_names=[*NAMES, *(f"past.{part}" for part in parts)],
            output_names=["logits", *(f"present.{part}" for part in parts)],
        )
    assert program is not None
    program.save(path, external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > 1.5e9)


def no_past(model: PreTrainedModel, rows: int, tokens: int = 0) -> Past:
    """Keys and values of `tokens` tokens that are zero. A layer without attention remembers one number a token."""
    like = next(model.parameters())
    past = []
    for layer in describe(model).layers:
        heads, width = (layer.num_key_value_heads, layer.head_dim) if layer.num_key_value_heads else (1, 1)
        # two tensors: one that is given twice would be traced as always the same
        past.append((like.new_zeros(rows, heads, tokens, width), like.new_zeros(rows, heads, tokens, width)))
    return past


class Onnx:
    """A written graph in onnxruntime, one row at a time, with its cache."""

    def __init__(self, path: Path):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self._past = {
            given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
            for given in self._session.get_inputs()
            if given.name.startswith("past.")
        }

    def logits(self, ids: Tensor) -> Tensor:
        """Those of the next tokens of a text, (T, vocabulary); the text so far is remembered."""
        seen = next(iter(self._past.values())).shape[2]
        given = {
            "input_ids": ids[None].numpy(),
            "attention_mask": np.ones((1, seen + len(ids)), np.int64),
            "position_ids": np.arange(seen, seen + len(ids))[None],
        }
        logits, *present = self._session.run(None, {**given, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        return torch.from_numpy(logits[0])
