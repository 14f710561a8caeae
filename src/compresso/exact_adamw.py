"""AdamW whose steps are not lost in the rounding of half precision.

Weights in half precision are too coarse for the small steps of training: what is stepped is a float32 copy of each,
and the model computes with its rounded value (Micikevicius et al. 2017, arXiv 1710.03740, section 3.1).
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class ExactAdamW(torch.optim.AdamW):
    """torch's AdamW without decay, for parameters of any format; `param_groups` hold what is stepped in float32."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float):
        self._exact = {p: p if p.dtype == torch.float32 else p.detach().float() for p in parameters}
        stepped = list(self._exact.values())
        on_cpu = all(p.device.type == "cpu" for p in stepped)  # there one pass takes a third of the loop's time
        super().__init__(stepped, lr=learning_rate, weight_decay=0.0, fused=on_cpu or None)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step, after which no parameter has a gradient."""
        for p, exact in self._exact.items():
            if exact is not p and p.grad is not None:
                exact.grad, p.grad = p.grad.float(), None
        super().step()
        self.zero_grad()
        for p, exact in self._exact.items():
            if exact is not p:
                p.copy_(exact)

    def held(self, parameter: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The float32 copy of a parameter, and its moments; none before the first step."""
        exact = self._exact[parameter]
        return exact, dict(self.state.get(exact, {}))

    @torch.no_grad()
    def take(self, parameter: Tensor, exact: Tensor, moments: dict[str, Tensor]) -> None:
        """Go on with these values and moments of a parameter, as `held` gave them."""
        own = self._exact[parameter]
        own.copy_(exact)
        if own is not parameter:
            parameter.copy_(own)
        if moments:  # the count of steps stays where torch keeps it, on the CPU
            self.state[own] = {key: m if key == "step" else m.to(own.device) for key, m in moments.items()}

    @torch.no_grad()
    def exchange(self, old: Tensor, new: Tensor, dim: int, places: Tensor) -> None:
        """Go on with `new`, which is `old` at these places along `dim`, and with its moments there."""
        before = self._exact.pop(old)
        after = new if before is old else before.index_select(dim, places)
        self._exact[new] = after
        for group in self.param_groups:
            group["params"] = [after if p is before else p for p in group["params"]]
        state = self.state.pop(before, {})
        self.state[after] = {
            key: value.index_select(dim, places) if value.shape == before.shape else value
            for key, value in state.items()
        }
