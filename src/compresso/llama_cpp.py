"""llama.cpp as a runtime, through the package xllamacpp: what it reads, predicts and writes."""

import importlib.util
import json
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU. Raises ValueError if the package is missing or the file does not load."""

    def __init__(self, path: Path, context: int = 512, threads: int = 1):
        try:
            import xllamacpp
        except ImportError:
            raise ValueError("llama.cpp is not here: pip install xllamacpp") from None
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.port = _free_port()  # two servers on one would answer for each other
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # rounds to half
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp does not load {path}: {error}") from error
        self.complete([0], 1)  # a server that goes before its loop has begun waits for it for ever

    def complete(self, prompt: Sequence[int] | str, tokens: int, **settings: Any) -> dict[str, Any]:
        """The server's own answer to a greedy completion."""
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "cache_prompt": True, **settings}
        given = self._server.handle_completions(asked)
        if "error" in given:
            raise ValueError(f"llama.cpp: {given['error']}")
        return given

    def log_probabilities(self, prompt: Sequence[int], tokens: int) -> dict[int, float]:
        """Of the `tokens` most likely next tokens, the most likely first."""
        plain = [[self.tokens("a")[-1], 1e3]]  # said whatever is likely: of a token that is no text, nothing is told
        found = self.complete(list(prompt), 1, n_probs=tokens, logit_bias=plain)["choices"][0]["logprobs"]
        return {entry["id"]: entry["logprob"] for entry in found["content"][0]["top_logprobs"]}

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The most likely tokens after a prompt, one after the other; the end of a text is no reason to stop."""
        said: list[int] = []
        for _ in range(tokens):
            said.append(next(iter(self.log_probabilities([*prompt, *said], 1))))
        return said

    def mean_nats(self, ids: Sequence[int]) -> float:
        """Mean loss of all tokens after the first, each predicted from those before it."""
        total = 0.0
        for i in range(1, len(ids)):
            said = self.complete(list(ids[:i]), 1, n_probs=1, logit_bias=[[ids[i], 1e3]])["choices"][0]["logprobs"]
            if said is None:  # a part of a character: found among all tokens
                total -= self.log_probabilities(ids[:i], 10**6)[ids[i]]
            else:
                total -= said["content"][0]["logprob"]
        return total / (len(ids) - 1)

    def tokens(self, text: str) -> list[int]:
        """As llama.cpp divides a text, special tokens read as such."""
        asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]
