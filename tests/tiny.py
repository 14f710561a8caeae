"""Tiny random models of every family with a tokenizer, random plans, records, and settings of a run of seconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from compresso.families import FAMILIES, Family, family_of
from compresso.plan import Plan
from compresso.shape import BINARY, ModelShape, describe
from documents import WORDS

QUICK = {
    "steps": 8,
    "recover_steps": 4,
    "batch_size": 4,
    "max_length": 48,
    "own_texts": 0,
    "own_share": 0.0,
    "distill": 0.0,
    "prompt": "short",
    "device": "cpu",
    "precision": "fp32",
}

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_model(model_type: str, seed: int = 0, **settings) -> PreTrainedModel:
    """Three layers, four query heads in two groups (or four), float32; norms and biases are not at their defaults."""
    special = {
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"tie_word_embeddings": True},
        "mistral": {"sliding_window": None},
        "smollm3": {"no_rope_layers": [1, 0, 1]},
        "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
        "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 64, "final_logit_softcapping": 5.0},
        "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 64},
        "opt": {"ffn_dim": 48},
        "gpt_neox": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
        "mixtral": {"num_local_experts": 4, "intermediate_size": 24, "sliding_window": None},
    }
    torch.manual_seed(seed)
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-3,  # large, so that forgetting to rescale it shows
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **special.get(model_type, {}),
        **settings,
    }
    family = FAMILIES[model_type]
    known = {family.intermediate_size, family.num_key_value_heads, family.norm_eps}
    absent = {"intermediate_size", "num_key_value_heads", "rms_norm_eps"} - known
    if family.derived_head_dim or values["head_dim"] is None:  # as real Qwen2 configs, which name none
        absent.add("head_dim")
    values = {name: value for name, value in values.items() if name not in absent}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    return model.eval()


def random_plan(model: PreTrainedModel, keep: float = 0.6, seed: int = 0, soft: bool = False) -> Plan:
    """A plan that keeps about this share of every unit, at 1 or at a random scale."""
    shape, family = describe(model), family_of(model.config.model_type)
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for unit, g in shape.open_gates().items():
        u = torch.rand(g.shape, generator=generator, dtype=torch.float64)
        on = (u < (0.8 if unit in ("attention", "mlp") else keep)).double()
        on[int(u.argmin())] = 1
        if unit in family.fixed:
            on[:] = 1
        for part, chance in zip(on.split(shape.sizes(unit)), u.split(shape.sizes(unit)), strict=True):
            part[chance.argsort()[: allowed(shape, family, unit, int(part.sum()))]] = 1
        if soft and unit not in BINARY:
            on *= 0.2 + 0.8 * torch.rand(g.shape, generator=generator, dtype=torch.float64)
        gates[unit] = on
    return Plan(shape, gates)


def allowed(shape: ModelShape, family: Family, unit: str, count: int) -> int:
    """The least number of units, not below this one, that a layer may keep."""
    if unit == "expert":
        return max(count, shape.experts_per_token) if count else 0
    return count + -count % (family.multiple if unit in ("intermediate", "hidden") else 1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def write_records(path: Path) -> Path:
    """Forty instruction records, as JSON lines."""
    rows = [
        {
            "instruction": f"say {WORDS[i % 17]}",
            "input": "" if i % 2 else WORDS[i % 5],
            "output": " ".join(WORDS[: 3 + i % 9]),
        }
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
