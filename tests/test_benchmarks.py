"""The tables of pages are those of the committed results; the paper's tables come out of evaluations."""

import json
from pathlib import Path
from types import SimpleNamespace

import paper_tables
import pytest
import quality
import readme_results
from PIL import Image

import compresso
from tiny import QUICK

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", readme_results.PAGES)
def test_the_tables_of_pages_are_those_of_the_committed_results(page):
    assert readme_results.filled(page) == (ROOT / page).read_text()


def test_the_picture_is_of_the_committed_results():
    figures = json.loads(Image.open(ROOT / readme_results.PICTURE).text["Figures"])
    found = json.loads(readme_results.QUALITY.read_text())
    assert figures == [list(mark) for mark in readme_results.quality_marks(found)]


def evaluation(name, stage, prompt, value, trained="long", data="alpaca"):
    """An eval.json of one model, every figure `value`."""
    entry = {"value": value, "stderr": 0.01, "prompt": prompt, "metric": "acc"}
    return {
        "models": {name: {"sparsity": 0.2, "stage": stage, "trained_prompt": trained, "trained_data": data}},
        "results": {
            name: {"mmlu": entry, "bbh": entry, "wikitext2@512": {**entry, "prompt": "none", "metric": "perplexity"}}
        },
        "averages": {name: {"commonsense": entry, "reading": entry}},
    }


def test_the_papers_tables(tmp_path):
    files = []
    for i, found in enumerate(
        [
            evaluation("runs/a", "recovered", "long", 0.5),
            evaluation("runs/a", "recovered", "none", 0.4),
            evaluation("runs/a/cut", "cut", "long", 0.3),
            evaluation("runs/b", "recovered", "none", 0.35, trained="none"),
            evaluation("runs/c", "recovered", "long", 0.45, data="c4"),
            evaluation("dense", "dense", "none", 0.6, trained=None),
        ]
    ):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(found))
    data, prompt, recovery = paper_tables.tables(paper_tables.columns_of(files))
    assert "| alpaca, 20 % | c4, 20 % |" in data
    assert "| commonsense | 50.00 ±1.00 | 45.00 ±1.00 |" in data
    assert "| trained with long, asked with none |" not in data
    for heading in (
        "trained with long, asked with long",
        "trained with long, asked with none",
        "trained with none, asked",
    ):
        assert heading in prompt
    assert "| mmlu | 50.00 ±1.00 | 40.00 ±1.00 (-10.00) | 35.00 ±1.00 (-15.00) |" in prompt
    assert "| bbh | 50.00 ±1.00 | 30.00 ±1.00 (-20.00) |" in recovery
    assert "60.00" not in data + prompt + recovery, "the dense model belongs to none of them"


def test_tasks_are_paired_with_ours_of_the_same_size_and_budget():
    def cell(method, seed, answers, sparsity=0.2, budget="small", distill=0.0):
        figures = {"method": method, "sparsity": sparsity, "budget": budget, "seed": seed}
        figures |= {"settings": {"own_share": 0.125, "distill": distill, "own_aim": "predictions"}}
        figures |= {"recovery": "none" if budget == "none" else "ours"}
        figures |= {"flops": 1e14, "instruction_loss": 2.0, "wikitext2_ppl": 40.0, "c4_ppl": 50.0}
        return figures | ({"answers": {"piqa": answers}, "suite": answers.count("1") / len(answers)} if answers else {})

    ours = [cell("l0", 0, ""), cell("l0", 1, "1" * 40), cell("l0", 2, "10" * 20)]
    wanda = [cell("wanda", 1, "1" * 30 + "0" * 10), cell("wanda", 2, "0" * 30), cell("wanda", 3, "")]
    flap = [cell("flap", 0, "0" * 20 + "1" * 20, budget="none")]
    without, elsewhere = [cell("taylor", 0, "")], [cell("flap", 0, "1" * 40, sparsity=0.3)]
    before = [cell("l0", 3, "0" * 40, distill=0.5)]
    cells = [*ours, *wanda, *flap, *without, *elsewhere, *before]
    assert quality.less_ours(wanda, cells).difference == pytest.approx(0.5 - 0.75), (
        "seeds' means, as far as all were asked"
    )
    assert quality.less_ours(flap, cells).difference == pytest.approx(0.5 - 0.75), "plans alone with ours of `small`"
    assert [quality.less_ours(group, cells) for group in (ours, without, elsewhere)] == [None] * 3
    dense = {"method": "dense", "seed": 0, "recovery": "none", "budget": "none"}
    dense |= {key: 0.0 for key in ("sparsity", "flops", "instruction_loss")}
    dense |= {"wikitext2_ppl": 26.0, "c4_ppl": 36.0}
    table = readme_results.quality_table(
        {"cells": [dense, *reversed(cells)], "versions": {"torch": "2", "transformers": "5"}},
    )
    assert "| 37.5 (0.0 to 75.0) | -25.0 [" in table
    assert "| 20 % | Compresso | ours, of before | 1.0e+14 | 1 |" in table


def test_a_cell_that_was_begun_goes_on(checkpoint, data, tmp_path):
    folder = tmp_path / "cell"
    config = {**QUICK, "model": str(checkpoint), "data": str(data), "output": str(folder), "overwrite": True}
    config |= {"recover_steps": 0, "method": "wanda"}
    assert quality._doing(folder, config) is None
    compresso.prune(**config)
    assert quality._doing(folder, config) == "prune"
    assert quality._doing(folder, {**config, "seed": 5}) is None, "of other settings"
    compresso.recover(str(folder), recover_steps=1)
    assert quality._doing(folder, config) == "recover"


def test_a_recovery_of_other_defaults_is_not_taken_for_one_of_todays(checkpoint, data, tmp_path, monkeypatch):
    """Its cut model is used again, and what it was is not told as what is the default now."""
    recovered, kept = [], []
    lab = object.__new__(quality.Lab)
    lab.work, lab.train, lab.parameters, lab.given = tmp_path, data, 10**5, SimpleNamespace(precision="fp32")
    lab.tokens_a_step = lambda _: 100.0
    lab.measure_folder = lambda *_: {}
    lab.tasks = lambda *_: {}
    lab.keep = lambda cell, figures, summary: kept.append(figures["settings"])
    common = {name: value for name, value in QUICK.items() if name not in ("own_share", "distill")}
    monkeypatch.setattr(quality, "COMMON", common)
    monkeypatch.setitem(quality.BUDGETS, "tiny", 2e9)
    recover = compresso.recover

    def once(folder, recover_steps):
        recovered.append(recover_steps)
        return recover(folder, recover_steps=1)

    monkeypatch.setattr(compresso, "recover", once)
    cell = quality.Cell("wanda", 0.3, "ours", "tiny", 0)
    model = {"model": str(checkpoint)}
    lab.run(cell, model)
    lab.run(cell, model)
    assert len(recovered) == 1, "done"
    told = tmp_path / "wanda-0.3-ours-tiny-0" / quality.TOLD
    told.write_text(json.dumps({**json.loads(told.read_text()), "own_aim": "drawn"}))
    lab.run(cell, model)
    assert len(recovered) == 2
    assert recovered[0] == recovered[1], "as many operations"
    assert [each["own_aim"] for each in kept] == ["predictions"] * 3
