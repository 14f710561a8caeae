"""The command line: parse, build the config, call one function, turn errors into messages."""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import tyro
from rich.console import Console

from compresso.config import STEPS, EvaluateConfig, PruneConfig, nearest, read_yaml
from compresso.flags import flags_of
from compresso.stopping import INTERRUPTED, TERMINATED, Stopped, Terminated, raise_on_sigterm

OVERVIEW = """\
Compresso makes large language models physically smaller.

  compresso prune --model demo --output runs/first        prune, recover, check, save
  compresso recover runs/first --recover-steps 1000       train the smaller model again
  compresso evaluate demo runs/first --suite quick        measure it, and compare with another
  compresso compare demo runs/first --message "Hello"     answers side by side
  compresso report runs/first                             a page with pictures
  compresso chat runs/first --message "Who are you?"      ask it something
  compresso estimate --model ./my-llama --gpu-memory 24   what a run would need
  compresso extract ./my-llama runs/first --output small  apply a run's plan to a checkpoint on disk
  compresso export runs/first --to gguf --output small    write it for llama.cpp, vLLM, onnxruntime
  compresso doctor runs/first                             is this machine fit, is a run whole, what next

`compresso COMMAND --help` tells the settings of a command."""

PRUNE = """\
Prune a checkpoint and recover, check and save the smaller one.

  compresso prune --model demo --target-sparsity 0.2 --output runs/demo
  compresso prune --model ./my-llama --data my.jsonl --text held_out.txt --steps 2000
  compresso prune --model ./my-llama --target-sparsity 0.5 --also 0.1,0.3 --output runs/three-sizes
  compresso prune --config runs/demo/config.yaml --target-sparsity 0.3 --output runs/demo-30

  compresso prune --resume runs/demo                      go on with a run that was stopped, or its recovery

--config FILE reads settings from YAML; flags override it. --print-config prints the
settings that would be used, in the form that --config reads, and stops."""

RECOVER = """\
Train the smaller model of a run again, from the cut model (or, with --further, from where it is).

  compresso recover runs/demo --recover-steps 1000
  compresso recover runs/demo --further --recover-steps 200 --learning-rate 5e-5"""

CHAT = """\
Ask a model, with the collaborative prompt that it carries.

  compresso chat runs/demo --message "What is a lake?"
  compresso chat runs/demo --prompt none"""

EVALUATE = """\
Measure models on suites of tasks by lm-eval, and compare them on the same documents.

  compresso evaluate demo runs/demo --suite quick --limit 200
  compresso evaluate demo runs/demo --suite paper,perplexity --data-dir my-data --limit 100
  compresso evaluate runs/demo --suite arc_easy,wikitext2@512 --prompt none --output no-prompt.json

Models are run folders, checkpoint folders, .gguf files or hub ids; the first is what the
others are compared with. An interrupted evaluation goes on where it stopped.
docs/evaluation.md tells what a suite measures."""

COMPARE = """\
Ask two models the same, and print their answers side by side.

  compresso compare demo runs/demo --message "What is a lake?"
  compresso compare demo runs/demo --message "What is a lake?" "Why is the sky blue?" """

REPORT = """\
Write a page with pictures about one run or several, report.html, and the pictures as PNGs.

  compresso report runs/demo
  compresso report runs/demo runs/demo-30 --output comparison.html"""

EXTRACT = """\
Apply the plan of a run to a checkpoint, from files to files, one tensor at a time: no training, hardly any memory.

  compresso extract ./my-llama runs/demo --output smaller

The plan fits only checkpoints of the model that it was made from (the same widths), fine-tuned ones too."""

ESTIMATE = """\
Tell what a run needs before it is started, from the model's config alone: memory by part, steps, tokens, hours.

  compresso estimate --model ./my-llama --gpu-memory 24
  compresso estimate --config configs/llama-3.1-70b-20.yaml --model configs/architectures/llama-3.1-70b --gpus 8
  compresso estimate --model ./my-llama --method wanda --refit --recover-steps 600

It takes every setting of `compresso prune` (`compresso prune --help` lists them) besides those below.
The model may be a folder that holds nothing but its config.json."""

EXPORT = """\
Write a pruned model in the form that a runtime loads; what was written is loaded and compared with the model.

  compresso export runs/demo --check
  compresso export runs/demo --to gguf --type q4_k_m --output small-gguf
  compresso export runs/demo --to padded --output small-padded

--check prints which runtimes load the model, and what to do for the others.
docs/deploy.md has a block to paste for each."""

DOCTOR = """\
Examine this machine and, if it is named, a run folder: what is good, what is wrong, and what to do about it.

  compresso doctor
  compresso doctor runs/demo

Of the machine: packages, devices, memory, disks, speed, the hub. Of a run: settings, plan, figures, models and the
headers of their weights; what can be continued, and the command that does it. The exit code is 1 if something is
wrong. No network is needed."""

Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Runs = Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
OneOrNone = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Text = Annotated[str | None, tyro.conf.arg(metavar="STR")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
Models = Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...", help="What to measure.")]


def _prune(args: list[str]) -> None:
    _no_more_than(args, 0, "the model goes after --model: compresso prune --model {}")
    args, run = _take(args, "--resume", True)
    if run is not None:
        if args:
            raise ValueError(f"--resume goes on with the settings of the run; leave out {' '.join(args)}")
        from compresso.pipeline import resume

        gc.freeze()
        resume(run)
        return
    args, printing = _take(args, "--print-config", False)
    config = _settings_of_prune(args, "compresso prune", PRUNE)
    if printing is not None:
        sys.stdout.write(config.to_yaml())
        return
    from compresso.pipeline import prune

    gc.freeze()  # runs collect every few steps, which need not look at what libraries made on import
    prune(config)


def _settings_of_prune(args: list[str], prog: str, description: str) -> PruneConfig:
    """What a file named by --config says, and in its place what the flags say."""
    args, path = _take(args, "--config", True)
    flags = flags_of(PruneConfig)
    of_file = read_yaml(path) if path is not None else {}
    try:
        checked = vars(PruneConfig(**of_file))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    steps = dict.fromkeys(STEPS, -1)
    if not any(arg.partition("=")[0] == "--preset" for arg in args):
        steps |= {name: checked[name] for name in STEPS if name in of_file}
    default = flags(**checked | steps)
    listed = _listed(args, ("--also", "--units", "--lora-targets"))
    return PruneConfig(**vars(tyro.cli(flags, args=listed, default=default, prog=prog, description=description)))


def _recover(args: list[str]) -> None:
    def settings(
        run: Run,
        /,
        further: bool = False,
        recover_steps: Count = None,
        learning_rate: Number = None,
        distill: Number = None,
        own_share: Number = None,
        batch_size: Count = None,
        data: Text = None,
        seed: Count = None,
    ) -> tuple[str, bool, dict]:
        """Of the command line.

        Args:
            run: Run folder of `compresso prune`.
            further: Go on from the last recovery instead of repeating it.
            recover_steps: Optimizer steps; as in the run unless given.
            learning_rate: Peak learning rate; as the run was asked for unless given, or the default for so many steps.
            distill: Share of the distance to the dense model's predictions in the loss; as in the run unless given.
            own_share: Share of the records that are texts of the dense model; as the run was asked for unless given, or
                the default for so many steps.
            batch_size: Records per step; as in the run unless given.
            data: Records, as for prune; as in the run unless given.
            seed: Seed of data order and LoRA; as in the run unless given.
        """
        given = {
            "recover_steps": recover_steps,
            "learning_rate": learning_rate,
            "distill": distill,
            "own_share": own_share,
            "batch_size": batch_size,
            "data": data,
            "seed": seed,
        }
        return run, further, {key: value for key, value in given.items() if value is not None}

    run, further, given = tyro.cli(settings, args=args, prog="compresso recover", description=RECOVER)
    from compresso.pipeline import recover

    gc.freeze()
    recover(run, further=further, **given)


def _chat(args: list[str]) -> None:
    def settings(
        model: Model, /, message: Text = None, prompt: Text = None, max_new_tokens: int = 256
    ) -> tuple[str, str | None, str | None, int]:
        """Of the command line.

        Args:
            model: Run folder, checkpoint folder, .gguf file or hub id.
            message: One question; without it, a prompt opens.
            prompt: Collaborative prompt instead of the stored one: long, long-past, middle, short, none, or a file.
            max_new_tokens: Longest answer, in tokens.
        """
        return model, message, prompt, max_new_tokens

    _no_more_than(args, 1, 'the message goes after --message: compresso chat MODEL --message "{}"')
    given = tyro.cli(settings, args=args, prog="compresso chat", description=CHAT)
    from compresso.chat import chat

    chat(*given)


def _evaluate(args: list[str]) -> None:
    flags: Any = flags_of(EvaluateConfig)

    def settings(models: Models, /, config: Annotated[flags, tyro.conf.arg(name="")]) -> Any:
        return models, config

    models, given = tyro.cli(settings, args=args, prog="compresso evaluate", description=EVALUATE)
    config = EvaluateConfig(**vars(given))
    from compresso.evaluation import evaluate

    evaluate(models, config)


def _compare(args: list[str]) -> None:
    def settings(
        first: Model, second: Model, /, message: list[str], prompt: Text = None, max_new_tokens: int = 128
    ) -> tuple[str, str, list[str], str | None, int]:
        """Of the command line.

        Args:
            first: Run folder, checkpoint folder, .gguf file or hub id.
            second: Another one.
            message: What to ask, one message or several.
            prompt: Instead of the stored ones, for both: long, long-past, middle, short, none, or a file.
            max_new_tokens: Longest answer, in tokens.
        """
        return first, second, message, prompt, max_new_tokens

    given = tyro.cli(settings, args=args, prog="compresso compare", description=COMPARE)
    from compresso.chat import compare

    compare(*given)


def _report(args: list[str]) -> None:
    def settings(runs: Runs, /, output: Text = None) -> tuple[list[str], str | None]:
        """Of the command line.

        Args:
            runs: Run folders.
            output: Page to write; report.html in the first run folder unless given.
        """
        return runs, output

    runs, output = tyro.cli(settings, args=args, prog="compresso report", description=REPORT)
    from compresso.report import report
    from compresso.workbench import console

    page = report(runs, output)
    console.print(f"written to {page}, its pictures to {page.parent / 'report'}", markup=False, highlight=False)


def _extract(args: list[str]) -> None:
    def settings(model: Model, run: Run, /, output: str) -> tuple[str, str, str]:
        """Of the command line.

        Args:
            model: Checkpoint folder with safetensors, or hub id.
            run: Run folder of `compresso prune`, or another one that holds plan.json and plan.safetensors.
            output: Folder to write.
        """
        return model, run, output

    model, run, output = tyro.cli(settings, args=args, prog="compresso extract", description=EXTRACT)
    if os.path.exists(os.path.join(model, "plan.json")) and not os.path.exists(os.path.join(run, "plan.json")):
        raise ValueError(f"the checkpoint comes first, then the run: compresso extract {run} {model} --output {output}")
    from compresso.streamed import extract_files
    from compresso.workbench import console

    for name, value in extract_files(model, run, output).items():
        console.print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}", markup=False)


def _export(args: list[str]) -> None:
    def settings(
        run: Model, /, to: Text = None, output: Text = None, type: str = "f16", check: bool = False
    ) -> tuple[str, str | None, str | None, str, bool]:
        """Of the command line.

        Args:
            run: Run folder, checkpoint folder, .gguf file or hub id.
            to: Form: stock, padded, hf, nemotron-nas, gguf or onnx.
            output: Folder to write.
            type: Numbers of a GGUF file's matrices: f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.
            check: Print which runtimes load the model, and keep it in its compatibility.json; nothing is exported.
        """
        return run, to, output, type, check

    run, to, output, kind, check = tyro.cli(settings, args=args, prog="compresso export", description=EXPORT)
    from compresso.export import export, show

    if check:
        from compresso.compatibility import check as check_runtimes

        check_runtimes(run)
        return
    if to is None or output is None:
        raise ValueError("--to FORMAT and --output FOLDER are needed; --check tells which format is for what")
    show(export(run, to, output, kind), output)


def _estimate(args: list[str]) -> None:
    def machine(
        gpus: int = 1, gpu_memory: Number = None, teraflops: Number = None
    ) -> tuple[int, float | None, float | None]:
        """Of the command line.

        Args:
            gpus: Processes, a GPU each.
            gpu_memory: Memory of each, in GB, to tell whether it fits.
            teraflops: Tera operations per second that each sustains, to tell the hours.
        """
        return gpus, gpu_memory, teraflops

    prog = "compresso estimate"
    _no_more_than(args, 0, "the model goes after --model: compresso estimate --model {}")
    (gpus, gpu_memory, teraflops), rest = tyro.cli(
        machine, args=args, prog=prog, description=ESTIMATE, return_unknown_args=True
    )
    for name, value in (("--gpus", gpus), ("--gpu-memory", gpu_memory), ("--teraflops", teraflops)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    config = _settings_of_prune(rest, prog, ESTIMATE)
    from compresso.estimate import estimate, show
    from compresso.workbench import console, status

    with status("running a step on shapes"):
        found = estimate(config, gpus, cpu=config.device == "cpu" or (gpu_memory is None and _no_gpu(config)))
    show(found, gpus, gpu_memory, teraflops, console)


def _no_gpu(config: PruneConfig) -> bool:
    import torch

    return config.device == "auto" and not torch.cuda.is_available()


def _doctor(args: list[str]) -> int:
    def settings(run: OneOrNone = None, /) -> str | None:
        """Of the command line.

        Args:
            run: Run folder of `compresso prune`, or a checkpoint folder.
        """
        return run

    run = tyro.cli(settings, args=args, prog="compresso doctor", description=DOCTOR)
    from compresso.doctor import doctor
    from compresso.workbench import console

    return 0 if doctor(run, console) else 1


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "prune": _prune,
    "recover": _recover,
    "evaluate": _evaluate,
    "compare": _compare,
    "report": _report,
    "extract": _extract,
    "export": _export,
    "estimate": _estimate,
    "chat": _chat,
    "doctor": _doctor,
}


def _no_more_than(args: list[str], count: int, hint: str) -> None:
    """Raise ValueError for a word more than a command takes before its flags; the parser would only call it unknown."""
    if len(args) > count and not any(arg.startswith("-") for arg in args[: count + 1]):
        raise ValueError(hint.format(args[count]))


def _take(args: list[str], flag: str, has_value: bool) -> tuple[list[str], str | None]:
    """Take one flag, written `--flag value` or `--flag=value`, out of the arguments."""
    for i, arg in enumerate(args):
        if arg == flag:
            if has_value and i + 1 == len(args):
                raise ValueError(f"{flag} needs a value")
            value = args[i + 1] if has_value else ""
            return args[:i] + args[i + 1 + has_value :], value
        if has_value and arg.startswith(flag + "="):
            return args[:i] + args[i + 1 :], arg.partition("=")[2]
    return args, None


def _listed(args: list[str], flags: tuple[str, ...]) -> list[str]:
    """`--units a,b` as the several words that the parser wants."""
    out: list[str] = []
    for arg in args:
        name, eq, value = arg.partition("=")
        if eq and name in flags:
            out += [name, *value.split(",")]
        elif out and out[-1] in flags:
            out += arg.split(",")
        else:
            out.append(arg)
    return out


def main(args: list[str] | None = None) -> int:
    """Run one command; the return value is the exit code.

    0 done, 2 a user's mistake, 1 ours (of doctor: something is wrong), 3 diverged, 4 another process gone, 5 a file
    could not be written, 6 memory ran out, 130 Ctrl-C, 143 SIGTERM.
    """
    try:
        return _run(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt as error:  # another signal, while the first was being told
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def _run(args: list[str]) -> int:
    """Run one command, and tell in a line what went wrong."""
    warnings.simplefilter("ignore", FutureWarning)  # between libraries; nothing that a user could act on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a remark about a kernel, even where it is not used
    raise_on_sigterm()
    errors = Console(stderr=True)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(OVERVIEW + "\n")
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"compresso {version('compresso-llm')}\n")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise ValueError(
                f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}; commands are {', '.join(COMMANDS)}"
            )
        return COMMANDS[args[0]](args[1:]) or 0
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        errors.print(f"compresso: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as error:
        ended = isinstance(error, Terminated)
        how = "terminated" if ended else "interrupted"
        errors.print(f"compresso: {how}; a run folder that was begun can go on: compresso prune --resume RUN")
        return TERMINATED if ended else INTERRUPTED
    except RuntimeError as error:
        errors.print(f"compresso: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code if isinstance(error, Stopped) else 1


if __name__ == "__main__":
    sys.exit(main())
