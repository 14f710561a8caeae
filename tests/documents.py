"""Documents of lm-eval's tasks, in the columns that its own task files read, and texts: made up, a few of each."""

import json
from pathlib import Path

WORDS = "the quick brown fox jumps over a lazy dog and then it rests under an old tree near the river".split()  # noqa: SIM905
ANSWERS = ["A", "B", "C", "D"]


def some(i, count=6):
    return " ".join(WORDS[(i + j) % 17] for j in range(count))


def document(task, i):
    """One document in the columns that lm-eval's own task file reads."""
    match task:
        case "piqa":
            return {"goal": some(i), "sol1": some(i + 1), "sol2": some(i + 2, 3), "label": i % 2}
        case "hellaswag":
            row = {"activity_label": "Running", "ctx_a": some(i), "ctx_b": some(i + 1), "ind": i, "label": str(i % 4)}
            return {**row, "endings": [some(i + k) for k in range(4)]}
        case "winogrande":
            return {
                "sentence": f"{some(i)} _ {some(i + 2)}",
                "option1": "fox",
                "option2": "dog",
                "answer": str(1 + i % 2),
            }
        case "arc_easy" | "arc_challenge":
            choices = {"text": [some(i + k, 2) for k in range(4)], "label": ANSWERS}
            return {"question": some(i), "choices": choices, "answerKey": ANSWERS[i % 4]}
        case "openbookqa":
            choices = {"text": [some(i + k, 2) for k in range(4)], "label": ANSWERS}
            return {"question_stem": some(i), "choices": choices, "answerKey": ANSWERS[i % 4]}
        case "storycloze_2016":
            story = {f"input_sentence_{k}": some(i + k) for k in range(1, 5)}
            return {**story, "sentence_quiz1": some(i), "sentence_quiz2": some(i + 3), "answer_right_ending": 1 + i % 2}
        case "boolq":
            return {"passage": some(i, 20), "question": some(i), "label": i % 2}
        case _:
            raise AssertionError(task)


def write_documents(folder: Path) -> Path:
    """Five documents of most tasks, two subjects of MMLU and one task of BBH, and two texts; the rest is lacking."""
    names = ["piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "storycloze_2016", "boolq"]
    for task in names:
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(document(task, i)) for i in range(5)))
    for kind in ("mmlu", "mmlu_dev"):
        (folder / kind).mkdir()
        for subject in ("anatomy", "astronomy"):
            rows = [{"question": some(i), "choices": ANSWERS, "answer": i % 4, "subject": subject} for i in range(6)]
            (folder / kind / f"{subject}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bbh").mkdir()
    rows = [{"input": some(i), "target": some(i, 1)} for i in range(3)]
    (folder / "bbh" / "snarks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text").mkdir()
    for text in ("wikitext2", "c4"):
        (folder / "text" / f"{text}.txt").write_text("\n".join(some(i, 12) for i in range(60)))
    return folder
