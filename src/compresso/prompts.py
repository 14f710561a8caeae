"""Collaborative prompts and instruction templates: texts that tell a model that it is being pruned.

The texts are those of Compresso (arXiv 2310.05015) and its published code, byte for
byte, with their own spellings ("###User Instruction:" but "### Input:").
"""

from dataclasses import dataclass, replace
from pathlib import Path

HEADER = "###System Instruction:\n"

BODIES = {
    "long": """\
Attention, LLM! You are undergoing optimization with a pruning algorithm to boost efficiency by removing redundant parameters. Here's what you need to know:
Improved Efficiency: The pruning algorithm streamlines your operations, enhancing overall performance.
Resource Utilization: Reducing unnecessary parameters optimizes computational resources and memory requirements.
Maintaining Quality: The algorithm selectively prunes to preserve language generation capabilities while minimizing impact on performance.
Iterative Refinement: Pruning occurs gradually, with fine-tuning after each step to ensure a smooth transition.
Collaboration: Embrace changes, continue generating high-quality language outputs to contribute to the optimization process.
Continuous Learning: Pruning helps you evolve, focusing on essential aspects of language generation.
Together, we'll create a leaner and more efficient version of you. Let's unlock your full potential through pruning.

""",
    "long-past": """\
Attention, LLM! You've undergone model pruning, and here's what's changed:
Improved Efficiency: The pruning process has streamlined your operations, boosting overall performance.
Resource Utilization: We've reduced unnecessary parameters to optimize computational resources and memory usage.
Maintained Quality: We've selectively pruned while preserving your language generation capabilities, minimizing the impact on performance.
Iterative Refinement: Pruning occurred gradually, with fine-tuning after each step to ensure a smooth transition.
Collaboration: Embrace these changes and continue generating high-quality language outputs to contribute to the optimization process.
Continuous Learning: Pruning helps you evolve, focusing on essential aspects of language generation. Together, we've created a leaner and more efficient version of you. Let's unlock your full potential through pruning!
""",
    "middle": """\
You're being pruned by an efficient algorithm to remove unimportant parameters, such as attention heads, hidden dimensions, and MLP intermediate dimensions. Collaborate to optimize your performance while minimizing parameters. Your cooperation in this endeavor is vital. As the algorithm progresses, please adapt and fine-tune your model parameters accordingly. Embrace the changes and work in harmony with the pruning algorithm to maximize the number of pruned parameters while safeguarding your performance.

""",
    "short": """\
Attention, LLM! You are undergoing optimization with a pruning algorithm to boost efficiency by removing redundant parameters. Please embrace changes, continue generating high-quality language outputs to contribute to the optimization process. Let's unlock your full potential through pruning! Please make any necessary adjustments to ensure your performance.

""",
}
"""The bodies after HEADER, each with the line break(s) that end it."""

_FULL = (
    "Below is an User Instruction that describes a task, paired with an input that provides further context, "
    "please take full consideration of the System Instruction mentioned above, and then write a response that "
    "appropriately completes the request.\n\n"
    "###User Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an User Instruction that describes a task, please take full consideration of the System Instruction "
    "mentioned above, and then write a response that appropriately completes the request.\n\n"
    "###User Instruction:\n{instruction}\n\n### Response:",
)
_SHORT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. please take "
    "full consideration of the System Instruction mentioned above, and then write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. please take full consideration of the System Instruction "
    "mentioned above, and then write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
_PLAIN = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
RAW_TEXT_TAIL = (
    "Below is a sequence of natural language text, please take full consideration of the system instruction "
    "mentioned above and proceed with the text completion accordingly.\n\n###Input:\n"
)

MMLU_SENTENCE = (
    " Please take full consideration of the System Instruction mentioned above, and then appropriately answer the "
    "questions."
)
"""Follows MMLU's own introduction where a prompt stands before it."""

NAMES = (*BODIES, "none")


@dataclass(frozen=True)
class CollaborativePrompt:
    """A prompt and where it is placed. It travels with the checkpoint, in config.json."""

    name: str
    body: str
    """Empty for `none`."""
    format: str
    """`alpaca`: the paper's templates. `chat`: the system turn of the tokenizer's chat template."""

    def filled(self, **values: float) -> "CollaborativePrompt":
        """The prompt with its fields replaced; sparsities are shown in percent, parameters in millions."""
        body = self.body
        for field, value in values.items():
            shown = f"{value / 1e6:.1f} million" if field == "parameters" else f"{100 * value:.1f}%"
            body = body.replace("{" + field + "}", shown)
        return replace(self, body=body)

    @property
    def system(self) -> str | None:
        """The system turn of a chat."""
        return self.body.strip() or None

    def instruction(self, instruction: str, input: str = "") -> str:
        """The text before a response, by the paper's templates (section 3 of its code's tasks/alpaca.py)."""
        tails = _PLAIN if not self.body else _SHORT if self.name == "short" else _FULL
        tail = tails[0] if input else tails[1]
        return self._head + tail.format(instruction=instruction, input=input)

    def raw_text(self) -> str:
        """The text before plain text that is to be continued; nothing without a prompt."""
        return self._head + RAW_TEXT_TAIL if self.body else ""

    def before_request(self, few_shot: bool = False) -> str:
        """The text before a request of a benchmark in the paper's form; nothing without a prompt.

        As lm_eval/models/compresso.py of the published code has it; for MMLU and BBH (`few_shot`)
        the body without its header, as instruct-eval/mmlu.py and bbh.py there.
        """
        if not self.body:
            return ""
        if few_shot:
            return self.body.rstrip("\n") + "\n\n"
        tail = _SHORT[1] if self.name == "short" else _FULL[0] if self.name == "middle" else _FULL[1]
        return self._head + tail.partition("\n\n")[0] + "\n\n###Input:\n"

    @property
    def _head(self) -> str:
        return HEADER + self.body if self.body else ""


def find_prompt(name: str, format: str) -> CollaborativePrompt:
    """A built-in prompt by name, or the user's own from a text file.

    Raises FileNotFoundError if the name is neither, ValueError if the file is empty or not text.
    """
    if name in NAMES:
        return CollaborativePrompt(name, BODIES.get(name, ""), format)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"prompt {name!r} is neither one of {', '.join(NAMES)} nor a text file")
    try:
        body = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"prompt file {path} is not UTF-8 text") from None
    if not body.strip():
        raise ValueError(f"prompt file {path} is empty; `--prompt none` goes without one")
    return CollaborativePrompt(path.name, body.rstrip() + "\n\n", format)
