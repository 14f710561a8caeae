"""A Plan says which units stay. It is the only thing that a method hands over.

`select` makes one from scores and a target; `save` and `load` keep it in a run folder.
Nothing here knows about gates that learn or about models that compute.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from compresso import whole_files
from compresso.shape import BINARY, LayerShape, ModelShape, sparsity
from compresso.untrusted import read_header, read_json

FORMAT = 1
LARGEST = 2**20  # of a width
TOLERANCE = 0.001
"""A plan may miss its target by this much (0.1 points) before coarse units are traded for fine ones."""


@dataclass(frozen=True)
class Plan:
    """The value of every gate of `shape`: 0 removes the unit, 1 keeps it, between scales it.

    `gates` maps each unit to one flat tensor, layer after layer. `hidden` is 0/1, because
    a scale in a tied embedding would scale the head too; `expert` is 0/1, because a router
    has no weight that takes a scale. A sub-layer whose units are all gone is gone, and the
    other way round. A mixture keeps as many experts as a token goes to, or none.
    """

    shape: ModelShape
    gates: dict[str, Tensor]

    def __post_init__(self):
        gates = self.shape.open_gates()
        for unit, values in self.gates.items():
            if unit not in gates or values.shape != gates[unit].shape:
                expected = {u: tuple(g.shape) for u, g in gates.items()}
                raise ValueError(f"a plan for this model has {expected}, found {unit!r} of shape {tuple(values.shape)}")
            if not torch.isfinite(values).all() or (values < 0).any() or (values > 1).any():
                raise ValueError(f"gates lie in [0, 1]; those of {unit!r} do not")
            gates[unit] = values.detach().double().cpu()
        for unit in set(BINARY) & gates.keys():
            if not torch.equal(gates[unit], (gates[unit] > 0).double()):
                raise ValueError(f"{unit} gates are 0 or 1")
        if not gates["hidden"].any():
            raise ValueError("at least one of the hidden gates is 1")
        for inner, outer in (("kv_group", "attention"), ("intermediate", "mlp"), ("expert", "mlp")):
            if inner in gates:
                gates[outer] = gates[outer] * torch.tensor([bool(part.any()) for part in self._parts(gates, inner)])
        for inner, outer in (("kv_group", "attention"), ("intermediate", "mlp"), ("expert", "mlp")):
            if inner in gates:
                alive = gates[outer] > 0
                gates[inner] = torch.cat([p * on for p, on in zip(self._parts(gates, inner), alive, strict=True)])
        least = self.shape.experts_per_token
        for layer, part in enumerate(self._parts(gates, "expert") if "expert" in gates else ()):
            if 0 < (kept := int(part.sum())) < least:
                raise ValueError(f"layer {layer} keeps {kept} of its experts, and each token goes to {least}")
        object.__setattr__(self, "gates", gates)

    def _parts(self, gates: dict[str, Tensor], unit: str) -> tuple[Tensor, ...]:
        return gates[unit].split(self.shape.sizes(unit))

    @property
    def keep(self) -> dict[str, list[Tensor]]:
        """Indices kept: for each unit one int64 tensor a layer (a single one for `hidden`)."""
        return {unit: [part.nonzero().squeeze(1) for part in self._parts(self.gates, unit)] for unit in self.gates}

    @property
    def sparsity(self) -> float:
        """Share of the prunable parameters that the extracted model lacks."""
        return float(sparsity(self.shape, {unit: (g > 0).double() for unit, g in self.gates.items()}))

    def scaled(self, values: dict[str, Tensor]) -> "Plan":
        """The same units kept, each (but those of BINARY) at the given value, which must be above 0."""
        scaled = values.keys() - set(BINARY)
        gates = {u: g * values[u].double().cpu() if u in scaled else g for u, g in self.gates.items()}
        return Plan(self.shape, gates)

    def widths(self) -> list[dict[str, int]]:
        """Key/value heads, query heads, FFN width and experts that each layer keeps."""
        kept = {unit: [len(indices) for indices in layers] for unit, layers in self.keep.items()}
        experts = kept.get("expert", [None] * len(self.shape.layers))
        parts = zip(self.shape.layers, kept["kv_group"], kept["intermediate"], experts, strict=True)
        return [LayerShape(n, layer.queries_per_group, layer.head_dim, w, e).widths for layer, n, w, e in parts]


@dataclass(frozen=True)
class _Block:
    """Units of one kind and layer that go together."""

    unit: str
    layer: int
    members: Tensor
    score: float


def _blocks(shape: ModelShape, scores: dict[str, Tensor], round_to: int) -> tuple[list[_Block], list[_Block]]:
    """What must go for `round_to`, and what may go, least valuable first.

    Of every layer the best group, the best `round_to` channels and as many experts as a
    token goes to stay, unless their sub-layer is a unit itself; so do the best `round_to`
    hidden channels.
    """
    forced: list[_Block] = []
    offered: list[_Block] = []
    for unit, values in scores.items():
        grain = round_to if unit in ("intermediate", "hidden") else 1
        floor = {"attention": 0, "mlp": 0, "expert": shape.experts_per_token}.get(unit, grain)
        offset = 0
        for layer, size in enumerate(shape.sizes(unit)):
            part = values[offset : offset + size].double().cpu()
            offset += size
            order = part.argsort(descending=True, stable=True)
            kept = size - size % grain
            if size > kept:
                forced.append(_Block(unit, layer, order[kept:], -torch.inf))
            if kept > floor:
                together = order[floor:kept].view(-1, grain)
                means = part[together].mean(dim=1).tolist()
                offered += (_Block(unit, layer, *block) for block in zip(together, means, strict=True))
    return forced, sorted(offered, key=lambda block: block.score)


class _Removal:
    """Gates while blocks are taken away, with the parameters left kept up to date."""

    def __init__(self, shape: ModelShape):
        self.shape = shape
        self.gates = {unit: list(g.split(shape.sizes(unit))) for unit, g in shape.open_gates().items()}
        self.hidden = shape.hidden_size
        self.attention = [layer.attention_rows for layer in shape.layers]
        self.channels = [layer.intermediate_size for layer in shape.layers]
        self.experts = [layer.experts for layer in shape.layers]
        self.rows = sum(map(shape.rows, shape.layers))
        self.before = self.hidden * self.rows

    def _rows(self, block: _Block) -> int:
        """Rows that go with a block (for `hidden`: none, but columns)."""
        layer, count, matrices = block.layer, len(block.members), self.shape.mlp_matrices
        match block.unit:
            case "kv_group":
                return min(count * self.shape.layers[layer].rows_per_group, self.attention[layer])
            case "intermediate":
                return min(count, self.channels[layer]) * self.experts[layer] * matrices
            case "expert":
                return min(count, self.experts[layer]) * self.channels[layer] * matrices
            case "attention":
                return self.attention[layer]
            case "mlp":
                return self.channels[layer] * self.experts[layer] * matrices
        return 0

    def sparsity(self, block: _Block | None = None) -> float:
        """Share removed so far, or if this block went as well."""
        hidden, rows = self.hidden, self.rows
        if block is not None:
            hidden -= len(block.members) if block.unit == "hidden" else 0
            rows -= self._rows(block)
        return 1 - hidden * rows / self.before

    def remove(self, block: _Block) -> None:
        rows, count = self._rows(block), len(block.members)
        self.rows -= rows
        match block.unit:
            case "hidden":
                self.hidden -= count
            case "kv_group" | "attention":
                self.attention[block.layer] -= rows
            case "intermediate":
                self.channels[block.layer] -= min(count, self.channels[block.layer])
            case "expert":
                self.experts[block.layer] -= min(count, self.experts[block.layer])
            case "mlp":
                self.channels[block.layer] = self.experts[block.layer] = 0
        self.gates[block.unit][block.layer][block.members] = 0

    def plan(self) -> Plan:
        return Plan(self.shape, {unit: torch.cat(parts) for unit, parts in self.gates.items()})


def largest_sparsity(shape: ModelShape, units: tuple[str, ...], round_to: int = 1) -> float:
    """The most that these units can give, with what `select` always keeps."""
    removal = _Removal(shape)
    forced, offered = _blocks(shape, {u: torch.zeros(sum(shape.sizes(u))) for u in units}, round_to)
    for block in (*forced, *offered):
        removal.remove(block)
    return removal.sparsity()


def select(shape: ModelShape, scores: dict[str, Tensor], target_sparsity: float, round_to: int = 1) -> Plan:
    """Remove the units of lowest score until `target_sparsity` of the prunable parameters is gone.

    `scores` maps each unit that may go to one flat tensor, comparable across kinds. The
    kept FFN widths and the hidden size are multiples of `round_to`. A unit that would
    overshoot is passed over for smaller ones, so that the result is within `TOLERANCE`
    of the target where unit sizes allow. A target of 0 is the identity.

    Raises ValueError if the units cannot give that much, or `round_to` forces more.
    """
    for unit, values in scores.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"the scores of {unit!r} are not finite")
    removal = _Removal(shape)
    if target_sparsity == 0:
        return removal.plan()
    if round_to > min(
        (size for u in scores if u in ("intermediate", "hidden") for size in shape.sizes(u) if size), default=round_to
    ):
        raise ValueError(f"--round-to {round_to} is wider than the narrowest FFN or hidden width of this model")
    largest = largest_sparsity(shape, tuple(scores), round_to)
    if target_sparsity > largest + TOLERANCE:
        raise ValueError(
            f"the units {','.join(scores)} can remove at most {largest:.4f} of the prunable parameters, "
            f"asked for {target_sparsity}; lower --target-sparsity or add --units"
        )
    forced, offered = _blocks(shape, scores, round_to)
    for block in forced:
        removal.remove(block)
    if removal.sparsity() > target_sparsity + TOLERANCE:
        raise ValueError(
            f"--round-to {round_to} alone removes {removal.sparsity():.4f} of the prunable parameters, "
            f"more than the target {target_sparsity}; choose a divisor of the widths"
        )
    passed_over: _Block | None = None
    for block in offered:
        if target_sparsity - removal.sparsity() <= TOLERANCE / 10:
            break
        if removal.sparsity(block) <= target_sparsity:
            removal.remove(block)
        elif passed_over is None or removal.sparsity(block) < removal.sparsity(passed_over):
            passed_over = block
    if passed_over and removal.sparsity(passed_over) - target_sparsity < target_sparsity - removal.sparsity():
        removal.remove(passed_over)
    return removal.plan()


def save(plan: Plan, folder: Path, about: dict) -> None:
    """Write plan.safetensors (the gates) and plan.json (shape, widths and `about`)."""
    gates = {unit: g.float().contiguous() for unit, g in plan.gates.items()}
    whole_files.write(folder / "plan.safetensors", to_bytes(gates))
    text = {
        "format": FORMAT,
        **about,
        "sparsity": plan.sparsity,
        "hidden_size": len(plan.keep["hidden"][0]),
        "widths": plan.widths(),
        "shape": asdict(plan.shape),
    }
    whole_files.write(folder / "plan.json", f"{json.dumps(text, indent=2)}\n".encode())


def load(folder: Path) -> Plan:
    """Read a plan back. Raises FileNotFoundError or ValueError, naming the file."""
    folder = Path(folder)
    for name in ("plan.json", "plan.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; a run folder of `compresso prune` has one")
    try:
        text = read_json(folder / "plan.json")
        if text["format"] != FORMAT:
            raise ValueError(f"format {text['format']}, this version reads {FORMAT}")
        layers = tuple(LayerShape(**layer) for layer in text["shape"]["layers"])
        shape = ModelShape(
            text["shape"]["hidden_size"],
            text["shape"]["mlp_matrices"],
            layers,
            text["shape"].get("experts_per_token", 1),  # which plans of dense models once did not have
        )
        in_layers = [n for layer in layers for n in vars(layer).values() if n is not None]
        numbers = [shape.hidden_size, shape.mlp_matrices, shape.experts_per_token, *in_layers]
        if not layers or not all(type(n) is int and 0 <= n <= LARGEST for n in numbers):
            raise ValueError(f"a shape whose sizes are no whole numbers up to {LARGEST:,}")
        sizes = {unit: (sum(shape.sizes(unit)),) for unit in shape.units}
        if (found := read_header(folder / "plan.safetensors")) != sizes:  # before as much is allocated
            raise ValueError(f"units {str(found)[:200]}, expected {sizes}")
        return Plan(shape, load_file(folder / "plan.safetensors"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, SafetensorError) as error:
        raise ValueError(f"{folder / 'plan.json'} or plan.safetensors is damaged: {str(error)[:500]}") from error
