"""What the kept widths must be, so that a runtime takes them: `--shape`."""

import math
from dataclasses import dataclass

CHOICES = "free, uniform, tp:N, vllm, llama.cpp, multiple:N"
PER_RANK = 16  # FFN channels that each process of a tensor parallel launch gets a multiple of
NATIVE = 128  # of which FFN widths are multiples, for fast kernels
K_QUANT = 256  # columns that llama.cpp's K-quants take together


@dataclass(frozen=True)
class Widths:
    """Rules that a plan keeps."""

    uniform: bool = False
    """Every layer keeps as many groups, and as many FFN channels."""
    round_to: int = 1
    """Kept FFN widths and the hidden size are multiples of this."""
    groups: int = 1
    """Kept groups are a multiple of this, or divide it; their query heads together are a multiple."""

    def allows(self, groups: int, queries: int) -> bool:
        """Whether so many groups, of so many query heads each, are allowed."""
        divided = groups % self.groups == 0 or self.groups % groups == 0
        return divided and groups * queries % self.groups == 0

    def nearest(self, groups: int, most: int, queries: int) -> int:
        """The allowed number of groups that is nearest to this one, the larger of two; all of them if none is."""
        allowed = [n for n in range(1, most + 1) if self.allows(n, queries)]
        return min(allowed, key=lambda n: (abs(n - groups), -n), default=most)


def parse(text: str, round_to: int = 1) -> Widths:
    """The rules of a word of CHOICES, together with `--round-to`. Raises ValueError for any other word."""
    name, _, number = text.partition(":")
    count = int(number) if number.isdigit() and int(number) else 0
    match name, bool(number), bool(count):
        case "free", False, _:
            own = Widths()
        case "uniform", False, _:
            own = Widths(uniform=True)
        case "vllm", False, _:
            own = Widths(uniform=True, round_to=NATIVE)
        case "llama.cpp", False, _:
            own = Widths(round_to=K_QUANT)
        case "tp", _, True:
            own = Widths(uniform=True, round_to=PER_RANK * count, groups=count)
        case "multiple", _, True:
            own = Widths(round_to=count)
        case _:
            raise ValueError(f"unknown --shape {text!r}; shapes are {CHOICES}")
    return Widths(own.uniform, math.lcm(own.round_to, round_to), own.groups)
