"""Few different shapes while a model learns: the same model, before, meanwhile and after."""

import pytest
import torch

from compresso.exact_adamw import ExactAdamW
from compresso.few_shapes import few_widths, rounded_length
from tiny import tiny_model

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt_neox", "arcee"])
def test_channels_of_zeros_change_nothing_and_learn_nothing(family):
    models = [tiny_model(family, num_hidden_layers=2) for _ in range(2)]
    torch.testing.assert_close(models[0](IDS).logits, models[1](IDS).logits)
    sizes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    for model, wanted in zip(models, (True, False), strict=True):
        with few_widths(model, wanted):
            parameters = dict(model.named_parameters())
            wider = {name for name, p in parameters.items() if p.shape != sizes[0][name]}
            assert bool(wider) == wanted
            optimizer = ExactAdamW(list(model.parameters()), 1e-2)
            for _ in range(3):
                model(IDS, labels=IDS).loss.backward()
                optimizer.step()
            for name in wider:
                added = parameters[name].detach().clone()
                added[tuple(map(slice, sizes[0][name]))] = 0
                assert not added.any(), name
    assert [{name: p.shape for name, p in model.named_parameters()} for model in models] == sizes
    torch.testing.assert_close(models[0](IDS).logits, models[1](IDS).logits, rtol=1e-3, atol=1e-3)


def test_rows_have_few_lengths_and_fit_the_context():
    for tokens in range(1, 600):
        length = rounded_length(tokens, None)
        assert tokens <= length < tokens + 16
        assert length <= tokens * 1.2 or tokens < 40
        assert rounded_length(tokens, tokens + 3) in range(tokens, tokens + 4)
    assert len({rounded_length(tokens, None) for tokens in range(40, 257)}) < 20
