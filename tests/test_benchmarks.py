"""The tables of pages are those of the committed results; the paper's tables come out of evaluations."""

import json
from pathlib import Path

import paper_tables
import pytest
import readme_results

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", readme_results.PAGES)
def test_the_tables_of_pages_are_those_of_the_committed_results(page):
    assert readme_results.filled(page) == (ROOT / page).read_text()


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
