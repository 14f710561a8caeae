"""Frozen weights in four bits while adapters and gates learn (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from compresso import checkpoint
from compresso.families import family_of
from compresso.streamed import StoredWeights


def load(place: Path, device: torch.device) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in a folder of safetensors, its matrices as NF4 with quantised scales; and the dtype it is stored in.

    Raises ValueError where bitsandbytes is missing, or for weights that cannot be read.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("--precision 4bit needs bitsandbytes: pip install 'compresso-llm[4bit]'")
    model_type = AutoConfig.from_pretrained(place, trust_remote_code=False).model_type
    if family_of(model_type).router:
        raise ValueError(
            f"--precision 4bit: bitsandbytes rounds modules, and the experts of a {model_type} are none, so that most "
            "of it would stay as it is; use bf16, --sharded over several GPUs if it does not fit"
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=torch.bfloat16,
            quantization_config=settings,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # what a class raises for tensors that it did not expect
        raise ValueError(f"the weights of {place} cannot be loaded: {checkpoint.first_line(error)}") from error
    if device.type == "cpu":
        _keep_trainable(model)
    return model.eval(), StoredWeights(place).dtype


def _keep_trainable(model: PreTrainedModel) -> None:
    """On a CPU bitsandbytes repacks matrices that run in eval mode, after which they give no gradient.

    A linear module computes the same in both modes, so these stay in the other one.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
            module.train = partial(_unchanged, module)


def _unchanged(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
