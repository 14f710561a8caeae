"""The bridge to lm-eval: its own Hugging Face model, with a prompt whose keys and values are computed once."""

import io
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from compresso import bounded
from compresso.batches import SHARED_PREFIX_FROM
from compresso.prefix import for_rows, is_shareable, positions_after, run_prefix, with_cache

LEAST_ROOM = 64  # tokens that a prompt must leave of the window
SEED = 1234  # lm-eval's own, for few-shot samples

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class PromptedLM(HFLM):
    """lm-eval's `hf` model of a loaded model, before each of whose requests stand the tokens `prefix`.

    Without a prefix it computes what `hf` computes with softmax_dtype=float32. `window` is
    the longest input, prefix included; longer requests are cut on the left, as lm-eval does, and counted in `cut`.
    `system_turn` is the prefix as text where it is the beginning of what the chat template renders.
    Raises ValueError if the prefix leaves no room.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix: list[int] | None = None,
        window: int | None = None,
        batch_size: int | str = 8,
        system_turn: str = "",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=window,
                softmax_dtype="float32",
                add_bos_token=False if prefix else None,  # the prefix begins with it
            )
        self.window: int = super().max_length
        if prefix and len(prefix) + LEAST_ROOM > self.window:
            raise ValueError(
                f"the collaborative prompt has {len(prefix)} tokens, and the window only {self.window}; use a "
                "shorter one (--prompt short, middle or none)"
            )
        self.prefix = torch.tensor(prefix or [], dtype=torch.long, device=self.device)
        self._cache = self._run(self.prefix)
        self.cut: set[int] = set()
        """doc_id of the documents that were longer than the window."""
        self._documents: list[int] = []
        self.advance: Callable[[int], None] = lambda count: None
        """Told how many requests were answered."""
        self._system_turn = system_turn

    @property
    def max_length(self) -> int:
        return self.window - len(self.prefix)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        with bounded.limits():
            text = super().apply_chat_template(chat_history, add_generation_prompt)
        if not text.startswith(self._system_turn):
            raise ValueError("the chat template does not begin with the system turn; evaluate without --chat-template")
        return text.removeprefix(self._system_turn)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._documents = [request.doc_id for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for document, (_, context, continuation) in zip(self._documents, requests, strict=False):
            if len(context) + len(continuation) > self.max_length + 1:
                self.cut.add(document)
            if len(continuation) > self.max_length:
                raise ValueError(f"an answer has {len(continuation)} tokens, and the window only {self.max_length}")
        with self._sharing(requests) as stripped:
            answers = super()._loglikelihood_tokens(stripped, *args, **kwargs)
        if any(math.isnan(value) for value, _ in answers):
            raise ValueError("the model's probabilities are not numbers (NaN); its weights may be damaged")
        return answers

    @contextmanager
    def _sharing(self, requests: list) -> Iterator[list]:
        """Run what all requests begin with (the examples of a few-shot task) once, and leave it out of them."""
        contexts = [context for _, context, _ in requests]
        columns = zip(*(context[:-1] for context in contexts), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        if len(requests) < 2 or shared < SHARED_PREFIX_FROM or self.cut:
            yield requests
            return
        own = self.prefix, self._cache
        longer = torch.cat([self.prefix, torch.tensor(contexts[0][:shared], device=self.device)])
        cache = self._run(longer)
        if cache is None:
            yield requests
            return
        try:
            self.prefix, self._cache = longer, cache
            yield [(strings, context[shared:], continuation) for strings, context, continuation in requests]
        finally:
            self.prefix, self._cache = own

    @torch.no_grad()
    def _run(self, prefix: Tensor) -> DynamicCache | None:
        """Keys and values of the prefix; None without one, or if the model has another kind of memory."""
        if not len(prefix):
            return None
        cache = run_prefix(self.model, prefix, self.config)
        return cache if is_shareable(cache) else None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            new = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if new >= self.max_length:
                raise ValueError(f"it generates {new} tokens, and the window has room for {self.max_length}")
            if len(self.tok_encode(request.args[0])) > self.max_length - new:
                self.cut.add(request.doc_id)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.advance(len(inps))
        if self._cache is None:
            whole = torch.cat([self.prefix.expand(len(inps), -1), inps], 1)
            return super()._model_call(whole, *args, **kwargs)[:, len(self.prefix) :]
        with torch.no_grad():
            return self.model(
                inps,
                position_ids=positions_after(len(self.prefix), inps),
                **with_cache(self.model, for_rows(self._cache, len(inps))),
            ).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        self.advance(len(context))
        length = len(self.prefix)
        before = self.prefix.expand(len(context), -1)
        mask = kwargs.pop("attention_mask")
        whole, mask = torch.cat([before, context], 1), torch.cat([torch.ones_like(before), mask], 1)
        cache = self._cache
        if getattr(self.config, "sliding_window", None) and not mask.all():
            order = mask.argsort(dim=1, stable=True)  # padding between prompt and text would take room in the window
            whole, mask, cache = whole.gather(1, order), mask.gather(1, order), None
        using = with_cache(self.model, for_rows(cache, len(context))) if cache else {}
        using.pop("use_cache", None)  # lm-eval passes it
        out = super()._model_generate(whole, max_length + length, stop, attention_mask=mask, **kwargs, **using)
        return out[:, length:]


def run_task(
    lm: PromptedLM, task: Task, limit: int | None, *, system: str | None = None, chat_template: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """lm-eval's samples of one task, in the order of its documents, and its aggregated metrics.

    With `chat_template`, requests become turns of it, after `system` as its system turn.
    """
    task.set_fewshot_seed(seed=SEED)
    lm.cut = set()
    with redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
        found = evaluate(
            lm,
            {"tasks": {task.task_name: task}},
            limit=limit,
            bootstrap_iters=0,
            system_instruction=system if chat_template else None,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    samples = sorted(found["samples"][task.task_name], key=lambda sample: sample["doc_id"])
    return samples, found["results"][task.task_name]
