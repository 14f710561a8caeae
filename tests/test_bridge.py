"""The bridge scores what lm-eval's own model scores, and a prompt that is run once changes nothing."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compresso.batches import Encoder
from compresso.bridge import PromptedLM, run_task
from compresso.extract import extract
from compresso.families import FAMILIES
from compresso.masks import gated
from compresso.prompts import find_prompt
from compresso.tasks import Wanted, build, task_manager
from documents import WORDS
from tiny import random_plan, tiny_model


def choices(count=12):
    """Requests of unequal length; each context has two answers, some of one token."""
    requests = []
    for i in range(count):
        context = " ".join(WORDS[: 2 + i % 7]) + ":"
        for answer in (" " + WORDS[i % 5], f" {WORDS[(i + 3) % 17]} {WORDS[(i + 1) % 17]}"):
            requests.append(Instance("loglikelihood", {}, (context, answer), 0, ("t", i, 1)))
    return requests


def questions(until):
    arguments = {"until": [until], "max_gen_toks": 6, "do_sample": False}
    return [
        Instance("generate_until", {}, (" ".join(WORDS[:n]), dict(arguments)), 0, ("t", n, 1)) for n in (2, 5, 9, 3)
    ]


def plain(model, tokenizer, batch_size=1):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def prompt_text(tokenizer):
    return find_prompt("short", "alpaca").before_request()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param, max_position_embeddings=1024)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 8])
class TestAgainstLmEval:
    def test_without_a_prompt(self, model, tokenizer, batch_size):
        ours = PromptedLM(model, tokenizer, batch_size=batch_size)
        expected = plain(model, tokenizer).loglikelihood(choices(), disable_tqdm=True)
        actual = ours.loglikelihood(choices())
        assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
        torch.testing.assert_close(*(torch.tensor([v for v, _ in r]) for r in (actual, expected)), rtol=0, atol=1e-4)
        asked = questions("fox")
        assert ours.generate_until(asked) == plain(model, tokenizer).generate_until(asked, disable_tqdm=True)

    def test_with_the_prompt_in_front_of_every_request(self, model, tokenizer, batch_size):
        text = prompt_text(tokenizer)
        ids = Encoder(tokenizer, 0, 1024).tokens_of_prefix(text)
        assert len(ids) > 50
        ours = PromptedLM(model, tokenizer, prefix=ids, batch_size=batch_size)
        before = [
            Instance("loglikelihood", {}, (text + r.args[0], r.args[1]), 0, ("t", r.doc_id, 1)) for r in choices()
        ]
        expected = plain(model, tokenizer).loglikelihood(before, disable_tqdm=True)
        actual = ours.loglikelihood(choices())
        torch.testing.assert_close(*(torch.tensor([v for v, _ in r]) for r in (actual, expected)), rtol=0, atol=1e-4)
        spoiled = PromptedLM(model, tokenizer, prefix=ids[::-1], batch_size=batch_size).loglikelihood(choices())
        assert max(abs(a - b) for (a, _), (b, _) in zip(spoiled, expected, strict=True)) > 0.01
        asked = questions("fox")
        long = [Instance("generate_until", {}, (text + q.args[0], q.args[1]), 0, ("t", q.doc_id, 1)) for q in asked]
        assert ours.generate_until(asked) == plain(model, tokenizer).generate_until(long, disable_tqdm=True)


@pytest.mark.filterwarnings("ignore")
def test_examples_that_all_requests_share_are_run_once(tokenizer):
    model = tiny_model("llama", max_position_embeddings=1024)
    shots = " ".join(WORDS * 3) + "\n\n"
    requests = [Instance("loglikelihood", {}, (shots + r.args[0], r.args[1]), 0, ("t", r.doc_id, 1)) for r in choices()]
    expected = plain(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    lengths = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    actual = PromptedLM(model, tokenizer).loglikelihood(requests)
    handle.remove()
    torch.testing.assert_close(*(torch.tensor([v for v, _ in r]) for r in (actual, expected)), rtol=0, atol=1e-4)
    assert sum(length > 40 for length in lengths) == 1, lengths
    ours = PromptedLM(model, tokenizer, prefix=[5, 6, 7] * 20)
    ours.loglikelihood(requests)
    assert len(ours.prefix) == 60, "the shared examples are forgotten afterwards"


@pytest.mark.filterwarnings("ignore")
def test_requests_in_chat_turns_are_lm_evals_own(tokenizer, tmp_path):
    """With the prompt as system turn, run once, and without one."""
    model = tiny_model("llama", max_position_embeddings=1024)
    path = tmp_path / "boolq.jsonl"
    rows = [{"passage": " ".join(WORDS[: 3 + i]), "question": WORDS[i], "label": i % 2} for i in range(6)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    wanted = Wanted("boolq", "boolq", files={"test": str(path)})
    manager = task_manager(None)
    encoder = Encoder(tokenizer, 0, 1024)
    for name in ("short", "none"):
        prompt = find_prompt(name, "chat")
        turn = encoder.system_turn(prompt)
        assert prompt.body.strip() in turn
        assert turn.count("<eos>") == (name == "short")
        ours = PromptedLM(model, tokenizer, prefix=encoder.tokens_of_prefix(turn), system_turn=turn)
        results = []
        for lm in (ours, plain(model, tokenizer)):
            samples, _ = run_task(lm, build(wanted, manager, False), None, system=prompt.system, chat_template=True)
            results.append(torch.tensor([float(r[0][0]) for s in samples for r in s["resps"]]))
        assert len(results[0]) == 12
        torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_model_under_gates_scores_what_the_extracted_one_scores(tokenizer):
    model = tiny_model("llama", max_position_embeddings=1024)
    plan = random_plan(model, soft=True)
    prefix = list(range(5, 45))
    with gated(model, plan.shape, plan.gates):
        masked = PromptedLM(model, tokenizer, prefix=prefix).loglikelihood(choices())
    smaller = PromptedLM(extract(model, plan), tokenizer, prefix=prefix).loglikelihood(choices())
    dense = PromptedLM(model, tokenizer, prefix=prefix).loglikelihood(choices())
    for (a, _), (b, _) in zip(masked, smaller, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert max(abs(a - b) for (a, _), (b, _) in zip(masked, dense, strict=True)) > 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_window_that_is_too_small(tokenizer):
    model = tiny_model("llama", max_position_embeddings=128)
    with pytest.raises(ValueError, match="collaborative prompt has 80 tokens, and the window only 128"):
        PromptedLM(model, tokenizer, prefix=[5] * 80)
    lm = PromptedLM(model, tokenizer, prefix=[5] * 60)
    long = Instance("loglikelihood", {}, (" ".join(WORDS * 4), " fox"), 0, ("t", 7, 1))
    lm.loglikelihood([*choices(2), long])
    assert lm.cut == {7}
    with pytest.raises(ValueError, match="generates 90 tokens, and the window has room for 68"):
        lm.generate_until([Instance("generate_until", {}, ("fox", {"until": [], "max_gen_toks": 90}), 0, ("t", 0, 1))])
