"""Compresso against what people use today: the same model, records and number of operations.

python benchmarks/quality.py --budget small --data records.jsonl --data-dir my-data
python benchmarks/quality.py --recovery none ...       # only the plans, minutes a cell
python benchmarks/quality.py --cells "l0 ours" "wanda local lora" ...       # these alone, also beside another process
python benchmarks/quality.py --suites ...              # tasks of the dense model, and of those in --work

SmolLM2-135M-Instruct is cut to 20, 30 and 50 % fewer parameters in its layers by every method. Without recovery each
cell is its plan alone. With recovery a cell may spend a budget of floating-point operations: two for each parameter and
token in a forward pass, twice that in a backward pass; the passes that calibrate, prune, teach and recover all count.
`lora` recovers as people do today, next-token loss on LoRA, at the better of two rates that were tried at 20 %
(LOG.md); `ours` as `compresso prune` does. Rivals get the best of their allocations. A tenth of the records (128 at
most) is held out for the instruction loss.

It resumes: run folders lie in --work and go on where they were stopped, and what is in benchmarks/results/quality.json
is not measured again.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import compresso
from compresso import checkpoint, progress, tuning, whole_files
from compresso.batches import Encoder, batches
from compresso.chat import prompt_for
from compresso.config import PruneConfig, read_yaml
from compresso.environment import versions
from compresso.few_shapes import few_widths
from compresso.methods import METHODS
from compresso.paired import Difference, difference, together
from compresso.perplexity import mean_loss, perplexity, text_windows, window_nats
from compresso.prepare import with_units
from compresso.prompts import find_prompt
from compresso.records import read_sources
from compresso.self_data import OWN_LENGTH
from compresso.texts import read_text
from compresso.workbench import compute_dtype, release_memory

RESULT = Path(__file__).parent / "results" / "quality.json"
BUDGETS = {"tiny": 1e14, "small": 3e14, "medium": 1.35e15}
"""Operations: about 7, 20 and 90 minutes of training on two cores of the machine that the results are from."""
SPENT = 0.95
"""Share of its budget that a cell must have used to stand; steps are planned from the mean length of records."""
PRUNING = 0.15
"""Share of a budget that learned gates may take; recovery takes the rest (LOG.md, 2026-11-28)."""
SPARSITIES = (0.2, 0.3, 0.5)
BATCH, LENGTH = 8, 192
COMMON = {"batch_size": BATCH, "max_length": LENGTH, "validation_records": 16, "perplexity_windows": 4}
PLAIN = {"prompt": "none", "distill": 0.0, "own_texts": 0, "tune": "lora", "learning_rate": 2e-3}
"""How rivals calibrate and recover."""
OURS: dict[str, Any] = {"prompt": "none"}
"""Where ours is not the default: a prompt takes a fifth of the tokens, and its worth is measured by itself."""
SUITE = "piqa,arc_easy,hellaswag,storycloze_2016"
WINDOWS = 48
TOLD = "recovery.json"  # in a run folder: what its recovery was to learn from, as the defaults were
BEST_RIVALS = 3
ALLOCATIONS = {
    **dict.fromkeys(("random", "shortgpt"), ("auto",)),
    **dict.fromkeys(("magnitude", "taylor", "taylor2"), ("auto", "local", "global")),  # some layers whole, as published
}


@dataclass(frozen=True)
class Cell:
    method: str
    sparsity: float
    recovery: str
    budget: str
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        return asdict(self)


KEY = tuple(field.name for field in fields(Cell))


class Lab:
    """Records, texts and results of one call."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.work: Path = given.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.train, self.held_out = self._split(given.data)
        model, self.tokenizer = checkpoint.load("demo")
        self.parameters = sum(p.numel() for p in model.parameters())
        self.windows = {
            name: text_windows(read_text(name, given.data_dir)[0], self.tokenizer, WINDOWS)
            for name in ("wikitext2", "c4")
        }
        self.encoder = Encoder(self.tokenizer, LENGTH)
        self.result = json.loads(RESULT.read_text()) if RESULT.exists() else {"cells": []}
        self.result["versions"] = versions()
        if not self.find(Cell("dense", 0.0, "none", "none", 0)):
            figures = {**self.measure(model, None), **self.tasks("demo", self.work / "dense-tasks.json")}
            self.keep(Cell("dense", 0.0, "none", "none", 0), figures, {})

    def _split(self, data: str) -> tuple[Path, list]:
        lines = Path(data).read_text().splitlines()
        stride = max(10, len(lines) // 128)
        train, held_out = self.work / "train.jsonl", self.work / "held-out.jsonl"
        learned = [line for i, line in enumerate(lines) if i % stride]
        for path, part in ((train, learned), (held_out, lines[::stride][:128])):
            content = "".join(f"{line}\n" for line in part).encode()
            if not path.exists() or path.read_bytes() != content:  # another process may be reading it
                whole_files.write(path, content)
        return train, read_sources(str(held_out))[0].records

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """A cell that is there, has spent what it was given on the records of today, and was asked the tasks."""
        least = SPENT * BUDGETS.get(cell.budget, 0)
        there = (c for c in self.result["cells"] if cell.key.items() <= c.items() and "answers" in c)
        return next((c for c in there if c["flops"] >= least and as_today(c)), None)

    def keep(self, cell: Cell, figures: dict[str, Any], summary: dict[str, Any]) -> None:
        operations = summary.get("operations", {})
        self.add({**cell.key, "flops": sum(operations.values()), "operations": operations, **figures})

    def add(self, entry: dict[str, Any]) -> None:
        """Put a cell in the place of the one that it is, beside what another process may have added."""
        key = {name: entry[name] for name in KEY}
        if RESULT.exists():
            self.result["cells"] = json.loads(RESULT.read_text())["cells"]
        self.result["cells"] = [c for c in self.result["cells"] if not key.items() <= c.items()] + [entry]
        whole_files.write(RESULT, f"{json.dumps(self.result, indent=2)}\n".encode())

    def measure(self, model: Any, prompt: Any) -> dict[str, Any]:
        """Instruction loss with the model's own prompt, perplexities without one."""
        model = checkpoint.cast(model, compute_dtype(self.given.precision, model.device))
        prompt = prompt or find_prompt("none", "chat")
        given = batches(self.held_out, self.encoder, prompt, parts=-(-len(self.held_out) // 8))
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "instruction_loss": mean_loss(model, given),
        }
        for name, windows in self.windows.items():
            found[f"{name}_ppl"] = perplexity(window_nats(model, windows))
        return found

    def measure_folder(self, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
        model, tokenizer = compresso.load(folder)
        metrics = folder.parent / "metrics.jsonl"
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        tokens = sum(json.loads(row)["tokens"] for row in rows)
        figures = self.measure(model, prompt_for(model, tokenizer, None))
        return {"tokens": tokens, **figures, "seconds": summary["seconds"] + summary.get("recovery_seconds", 0.0)}

    def tokens_a_step(self, prompt: str) -> float:
        """Tokens through the model in a step, what all records begin with counted once: a mean over 100 batches."""
        found = find_prompt(prompt, "chat").filled(sparsity=0.2, target_sparsity=0.2, parameters=1)
        records = read_sources(str(self.train))[0].records
        sample = records[:: max(1, len(records) // (100 * BATCH))]
        groups = (sample[i : i + BATCH] for i in range(0, len(sample) - BATCH + 1, BATCH))
        return statistics.mean(batches(group, self.encoder, found)[0].computed for group in groups)

    def folder(self, key: dict[str, Any]) -> Path:
        return self.work / "-".join(str(key[name]).replace(" ", "-") for name in KEY)

    def tasks(self, name: str, output: Path) -> dict[str, Any]:
        """Answers of a model to each task, a 1 for each document it got right and a 0 for each other one, and their
        mean."""
        found = compresso.evaluate(
            [name],
            suite=SUITE,
            limit=self.given.suite_limit,
            data_dir=str(self.given.data_dir),
            cost=False,
            output=str(output),
        )["results"][name]
        right = {task: entry["metrics"][entry["metric"]]["scores"] for task, entry in found.items()}
        answers = {task: "".join(str(int(score)) for score in scores) for task, scores in right.items()}
        return {"suite": statistics.mean(map(statistics.mean, right.values())), "answers": answers}

    def suites(self) -> None:
        """Tasks of the dense model and of the cells in --work, as far as not so many answers are known."""
        for cell in list(self.result["cells"]):
            known = min(map(len, cell.get("answers", {"": ""}).values()))
            if known >= self.given.suite_limit:
                continue
            folder = self.folder(cell)
            if cell["method"] == "dense":
                self.add({**cell, **self.tasks("demo", self.work / "dense-tasks.json")})
            elif folder.exists():
                self.add({**cell, **self.tasks(str(folder), folder / "tasks.json")})

    def run(self, cell: Cell, settings: dict[str, Any]) -> None:
        """Prune, and recover with what is left of the budget."""
        folder = self.folder(cell.key)
        config = {
            **COMMON,
            "model": "demo",
            "data": str(self.train),
            "target_sparsity": cell.sparsity,
            "seed": cell.seed,
            "precision": self.given.precision,
        }
        config |= {"output": str(folder), "overwrite": True, **settings}
        given = PruneConfig(**config)
        tokens = self.tokens_a_step(given.prompt)
        tune = config.get("tune", "full")
        share = tuning.recovery_distill(given, tune)
        if cell.method == "l0":
            a_step = (6 + 2 * bool(tuning.distill(given, tune))) * self.parameters * tokens
            config["steps"] = max(20, int(PRUNING * BUDGETS[cell.budget] / a_step))
        print(f"{cell.key}: {BUDGETS.get(cell.budget, 0):.1e} operations", flush=True)
        config |= {"method": cell.method.split()[0], "recover_steps": 0}
        doing = _doing(folder, config)
        told = _told(folder)
        if doing == "recover" and not as_today({**cell.key, "settings": told}):
            doing = "prune"  # what was recovered before is not what is wanted; its cut model is
            summary = json.loads((folder / "summary.json").read_text())
        else:
            summary = compresso.resume(str(folder)) if doing else compresso.prune(**config)
        if cell.recovery != "none" and doing != "recover":
            left = BUDGETS[cell.budget] - sum(summary["operations"].get(stage, 0) for stage in ("calibration", "prune"))
            learning = 6 * _learning(folder / "cut", given.tune)
            dense = 2 * self.parameters
            given = replace(given, recover_steps=int(left / ((learning + dense * bool(share)) * tokens)))
            own = tuning.own_share(given, tune)
            texts = own * BATCH * OWN_LENGTH  # tokens a step, each text twice, so that half of them are written
            tokens = (1 - own) * tokens + texts
            of_dense = dense * ((tokens if share else texts) + texts / 2)  # predicted, and written
            steps = max(1, int(left / (learning * tokens + of_dense)))
            print(f"{cell.key}: {steps} steps of recovery", flush=True)
            told = {"distill": share, "own_share": own, "own_aim": "predictions", "recover_steps": steps}
            whole_files.write(folder / TOLD, json.dumps(told).encode())
            summary = compresso.recover(str(folder), recover_steps=steps)
        figures = self.measure_folder(folder / "model", summary)
        settings = {
            **settings,
            "precision": self.given.precision,
            "own_texts": given.own_texts,
            **told,
        }
        figures |= self.tasks(str(folder), folder / "tasks.json")
        self.keep(cell, {"settings": settings, "prunable_sparsity": summary["sparsity"], **figures}, summary)
        release_memory()


def less_ours(cells: list[dict[str, Any]], all_cells: list[dict[str, Any]]) -> Difference | None:
    """How much better than learned gates of as many operations some cells of one kind answer the same documents.

    Of a document the mean over seeds counts on both sides. Ours are those of today's defaults if there are any. Plans
    without recovery are compared with ours of the `small` budget. None if one side was not asked, or if the cells are
    ours.
    """
    budget = cells[0]["budget"].replace("none", "small")
    of_ours = {"method": "l0", "recovery": "ours", "sparsity": cells[0]["sparsity"], "budget": budget}
    ours = newest([c for c in all_cells if of_ours.items() <= c.items()])
    asked_ours, asked = ([c for c in side if "answers" in c] for side in (ours, cells))
    if not asked_ours or not asked or cells[0] in ours:
        return None
    tasks = asked[0]["answers"]
    parts = [
        difference(*_of_both([c["answers"][task] for c in asked_ours], [c["answers"][task] for c in asked]))
        for task in tasks
    ]
    return together(parts, [1.0] * len(parts))


def _of_both(*sides: list[str]) -> list[list[float]]:
    """Mean over seeds for each of the first documents, as far as all were asked."""
    asked = min(len(answers) for side in sides for answers in side)
    return [[statistics.mean(int(answers[i]) for answers in side) for i in range(asked)] for side in sides]


def newest(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of today's defaults if there are any, else all."""
    return [c for c in cells if as_today(c)] or cells


def as_today(entry: dict[str, Any]) -> bool:
    """Whether a cell of ours recovered on such shares of own texts and the dense model's predictions as are the default
    for so many steps, the aim of own texts those predictions (earlier cells: the tokens that were drawn)."""
    if entry["recovery"] != "ours":
        return True
    settings = entry["settings"]
    given = PruneConfig(target_sparsity=entry["sparsity"], recover_steps=settings.get("recover_steps", 0))
    wanted = {"own_share": tuning.own_share(given, "full"), "distill": tuning.recovery_distill(given, "full")}
    if wanted["own_share"]:
        wanted["own_aim"] = "predictions"
    return bool({"own_share": 0.0, **settings}.items() >= wanted.items())


def _told(folder: Path) -> dict[str, Any]:
    path = folder / TOLD
    return json.loads(path.read_text()) if path.exists() else {}


def _learning(folder: Path, tune: str) -> int:
    """Parameters of a cut model while it recovers, with the zeros that fill up its widths."""
    model, _ = compresso.load(folder)
    with few_widths(model, wanted=tune != "lora"):
        return sum(p.numel() for p in model.parameters())


def _doing(folder: Path, config: dict[str, Any]) -> str | None:
    """The command that a run of these settings is in the middle of, or has done last; None if there is no such run."""
    wanted = with_units(PruneConfig(**{**config, "overwrite": False}), "llama")
    try:
        there = PruneConfig(**read_yaml(folder / "config.yaml"))
        return progress.read(folder).doing if there == wanted else None
    except (FileNotFoundError, ValueError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records, a .jsonl file")
    parser.add_argument("--data-dir", type=Path, required=True, help="texts and tasks, as for compresso evaluate")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as of compresso prune")
    parser.add_argument("--recovery", choices=("none", "all"), default="all")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--cells", nargs="+", help="METHOD [ALLOCATION] RECOVERY, of one --seed")
    parser.add_argument("--seed", type=int, default=0, help="of --cells")
    parser.add_argument("--suites", action="store_true", help="only tasks, of models in --work that lack them")
    parser.add_argument("--seeds", type=int, default=3, help="for ours and the best rival")
    parser.add_argument("--suite-limit", type=int, default=200, help="documents a task")
    given = parser.parse_args()
    lab = Lab(given)
    if given.suites:
        lab.suites()
        show(lab.result)
        return
    if given.cells:
        for sparsity, words in itertools.product(given.sparsities, given.cells):
            name, *allocation, recovery = words.split()
            settings = {"allocation": allocation[0]} if allocation else {}
            if recovery == "none":
                _plan(lab, sparsity, name, allocation[0] if allocation else "auto")
            else:
                _learn(lab, Cell(name, sparsity, recovery, given.budget, given.seed), settings)
        show(lab.result)
        return
    rivals = [name for name in METHODS if name != "l0"]
    for sparsity in given.sparsities:
        for name in rivals:
            for allocation in ALLOCATIONS.get(name, ("local", "global")):
                _plan(lab, sparsity, name, allocation)
    if given.recovery == "all":
        for sparsity in given.sparsities:
            _recovered(lab, given, sparsity, rivals)
    show(lab.result)


def _plan(lab: Lab, sparsity: float, name: str, allocation: str) -> None:
    """A method's plan alone, each allocation a cell of its own."""
    cell = Cell(f"{name} {allocation}".removesuffix(" auto"), sparsity, "none", "none", 0)
    if not lab.find(cell):
        lab.run(cell, {**PLAIN, "allocation": allocation})


def _recovered(lab: Lab, given: argparse.Namespace, sparsity: float, rivals: list[str]) -> None:
    """Ours and the best rivals, seed after seed."""
    plans = [c for c in lab.result["cells"] if c["recovery"] == "none" and c["sparsity"] == sparsity]
    best: dict[str, dict] = {}
    for plan in sorted(plans, key=lambda c: c["wikitext2_ppl"] * c["c4_ppl"], reverse=True):
        best[plan["method"].split()[0]] = plan
    ranked = sorted(best.values(), key=lambda c: c["wikitext2_ppl"] * c["c4_ppl"])[:BEST_RIVALS]
    todo = [(Cell("l0", sparsity, "ours", given.budget, 0), {})]
    for rank, plan in enumerate(ranked):
        name, _, allocation = plan["method"].partition(" ")
        chosen = {"allocation": allocation or "auto"}
        todo.append((Cell(name, sparsity, "lora", given.budget, 0), chosen))
        if rank == 0:
            todo.append((Cell(name, sparsity, "ours", given.budget, 0), chosen))
            for seed in range(1, given.seeds):
                todo.append((Cell(name, sparsity, "lora", given.budget, seed), chosen))
    todo += [(Cell("l0", sparsity, "ours", given.budget, seed), {}) for seed in range(1, given.seeds)]
    for cell, settings in sorted(todo, key=lambda pair: pair[0].seed):
        _learn(lab, cell, settings)


def _learn(lab: Lab, cell: Cell, settings: dict[str, Any]) -> None:
    if not lab.find(cell):
        lab.run(cell, {**(PLAIN if cell.recovery == "lora" else OURS), **settings})


def show(result: dict[str, Any]) -> None:
    columns = ("instruction_loss", "wikitext2_ppl", "c4_ppl")
    print(f"{'':34}{'loss':>8}{'wikitext2':>12}{'c4':>10}")
    for c in sorted(result["cells"], key=lambda c: (c["sparsity"], c["budget"], c["recovery"], c["wikitext2_ppl"])):
        name = f"{c['method']} {100 * c['sparsity']:.0f} % {c['recovery']} {c['budget']} {c['seed']}"
        print(f"{name:34}" + "".join(f"{c[key]:>10.3f}" for key in columns))


if __name__ == "__main__":
    main()
