"""For any shape and plan of a tiny model: what is extracted computes the same, files give back what they got."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from compresso import plan as plans
from compresso.extract import extract
from compresso.masks import gated
from compresso.shape import count_prunable, describe, prunable_parameters
from compresso.streamed import StoredWeights
from compresso.untrusted import read_header
from tiny import random_plan, tiny_model

IDS = torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(0))
FEW = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
shapes = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "num_key_value_heads": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 4, 8]),
        "intermediate_size": st.integers(1, 20),
        "hidden_size": st.sampled_from([36, 72]),
        "tie_word_embeddings": st.booleans(),
    }
)
models = st.tuples(
    st.sampled_from(["llama", "qwen2", "qwen3", "mistral"]), shapes, st.integers(1, 3), st.integers(0, 99)
)


def made(drawn):
    kind, shape, queries, seed = drawn
    heads = shape["num_key_value_heads"] * queries
    return tiny_model(kind, seed=seed, vocab_size=60, num_attention_heads=heads, **shape)


@FEW
@given(drawn=models, keep=st.floats(0.1, 0.9), soft=st.booleans(), seed=st.integers(0, 99))
@torch.no_grad()
def test_extract_save_and_load_compute_what_the_gates_computed(drawn, keep, soft, seed):
    model = made(drawn)
    plan = random_plan(model, keep, seed, soft)
    with gated(model, plan.shape, plan.gates):
        expected = model(IDS).logits
    smaller = extract(model, plan)
    scale = max(1.0, float(expected.abs().max()))
    assert float((smaller(IDS).logits - expected).abs().max()) < 1e-4 * scale
    by_formula = prunable_parameters(plan.shape, {unit: (g > 0).double() for unit, g in plan.gates.items()})
    assert count_prunable(smaller) == int(by_formula)
    with tempfile.TemporaryDirectory() as folder:
        smaller.save_pretrained(folder)
        header = read_header(Path(folder) / "model.safetensors")
        stored = StoredWeights(Path(folder))
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == header
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        kept, back = smaller.state_dict(), loaded.state_dict()
        assert list(kept) == list(back)
        assert all(torch.equal(kept[name], back[name]) for name in kept)
        assert float((loaded(IDS).logits - smaller(IDS).logits).abs().max()) < 1e-5 * scale
        assert describe(loaded) == describe(smaller)


@FEW
@given(drawn=models, keep=st.floats(0.05, 0.95), soft=st.booleans(), seed=st.integers(0, 99))
def test_a_plan_comes_back_as_it_was(drawn, keep, soft, seed):
    plan = random_plan(made(drawn), keep, seed, soft)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plans.save(plan, folder, {"method": "l0"})
        loaded = plans.load(folder)
        assert loaded.shape == plan.shape
        assert all(torch.equal(loaded.gates[unit], gates.float().double()) for unit, gates in plan.gates.items())
        assert loaded.widths() == plan.widths() == json.loads((folder / "plan.json").read_text())["widths"]
        assert 0 <= loaded.sparsity <= 1
