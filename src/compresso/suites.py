"""The suites: which tasks, and which figure of each. Data only; `tasks` turns them into lm-eval's tasks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """One of our names for a task of lm-eval."""

    lm_eval: str
    normed: bool = False
    """Whether `acc_norm` exists, which llm-pruner's protocol takes."""


ALIASES = {
    "storycloze_2016": Alias("storycloze_2016"),
    "piqa": Alias("piqa", normed=True),
    "hellaswag": Alias("hellaswag", normed=True),
    "winogrande": Alias("winogrande"),
    "arc_easy": Alias("arc_easy", normed=True),
    "arc_challenge": Alias("arc_challenge", normed=True),
    "openbookqa": Alias("openbookqa", normed=True),
    "boolq": Alias("boolq"),
    "race_high": Alias("race"),
    "mmlu": Alias("mmlu"),
    "bbh": Alias("bbh_fewshot"),
}

COMMONSENSE = ("storycloze_2016", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
WINDOWS = (128, 512, 2048)
SUITES: dict[str, tuple[str, ...]] = {
    "commonsense": COMMONSENSE,
    "reading": ("boolq", "race_high"),
    "mmlu": ("mmlu",),
    "bbh": ("bbh",),
    "paper": (*COMMONSENSE, "boolq", "race_high", "mmlu", "bbh"),
    "llm-pruner": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    "perplexity": tuple(f"{text}@{window}" for text in ("wikitext2", "ptb", "c4") for window in WINDOWS),
    "quick": ("piqa", "arc_easy", "hellaswag", "storycloze_2016", "wikitext2@512"),
}
"""Names of ours; TEXT@WINDOW is a perplexity."""


def averaged(suite: str) -> tuple[str, ...]:
    """The tasks whose mean is the figure of a suite; none where a mean says nothing."""
    return SUITES[suite] if suite in ("commonsense", "reading", "llm-pruner") else ()


def metric_of(suite: str, task: str) -> str | None:
    """The metric that a suite takes of a task; None: the task's own."""
    alias = ALIASES.get(task)
    if suite == "llm-pruner":
        return "acc_norm" if alias and alias.normed else "acc"
    return "acc" if alias and task != "bbh" else None
