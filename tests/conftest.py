"""Fixtures: a tiny tokenizer with a chat template, tiny checkpoints on disk, records."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from documents import WORDS, write_documents
from tiny import tiny_model

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and two processes would crawl

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def local(tmp_path_factory) -> Path:
    """A folder for --data-dir."""
    return write_documents(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Forty instruction records."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
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
