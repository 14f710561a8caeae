"""Fixtures: a tiny tokenizer with a chat template, tiny checkpoints on disk, records."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start too: more would crawl

import hypothesis  # noqa: F401  (what it finds of other libraries it must find before gc.freeze)
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import compresso.evaluation
import compresso.report  # noqa: F401
from documents import write_documents
from tiny import tiny_model, tiny_tokenizer, write_records

logging.set_verbosity_error()
logging.disable_progress_bar()
gc.freeze()  # runs collect often, and half of their time would go into what libraries made on import
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and two processes would crawl


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


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
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl")
