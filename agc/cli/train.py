"""``agc train``: a recipe, trained by a framework."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from agc.cli.frameworks import framework_names, load_framework
from agc.cli.tensorboard import tensorboard
from agc.data import PARTS, open_source
from agc.errors import ConfigError, NonFiniteError
from agc.packages import need
from agc.recipe import load_recipe
from agc.training import Launch, Training, stop_signals

__all__ = ["STOPPED", "register"]

STOPPED: Final = 75
"""Exit status of a training that was told to stop, and can go on."""

_EXAMPLE: Final = """\
examples:
  agc train digits-mini --framework torch --out run
  agc train mine.toml --framework torch --data /data/imagenet --out run --resume

exit status: 0 at the end of the training; 75 if SIGTERM or Ctrl-C stopped it, after the step was
finished and saved, so that the same command with --resume goes on; 1 if it diverged; 2 for misuse
"""


def register(subparsers: Any) -> None:
    """Add the command ``train`` to ``agc`` (entry-point group ``agc.commands``)."""
    plain = Launch()
    command = subparsers.add_parser(
        "train",
        help="train a recipe; stop and go on whenever you like",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("recipe", metavar="RECIPE", help="name, or path of a .toml file")
    command.add_argument(
        "--framework", required=True, choices=framework_names(), help="what trains"
    )
    command.add_argument("--data", type=Path, metavar="DIR", help="folder of the images")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of log and checkpoints"
    )
    command.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help='weights that a recipe with model.init="file" begins from, of any form',
    )
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    command.add_argument(
        "--allow-changed", action="store_true", help="go on although the recipe is another one"
    )
    command.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, as TOML: train.steps=100",
    )
    command.add_argument(
        "--microbatch", type=int, metavar="N", help="examples of one pass, to save memory"
    )
    command.add_argument("--device", metavar="NAME", help="a device, as the framework calls it")
    command.add_argument(
        "--engine", metavar="NAME", help="how the framework uses several devices, as it calls it"
    )
    command.add_argument(
        "--sharded",
        action="store_true",
        help="write checkpoints on the way by all processes, in the framework's own form",
    )
    command.add_argument(
        "--coordinator", metavar="HOST:PORT", help="process 0 of several, where JAX finds none"
    )
    command.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    command.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    command.add_argument(
        "--threads",
        type=int,
        default=plain.threads,
        metavar="N",
        help=f"threads that prepare images ({plain.threads})",
    )
    command.add_argument(
        "--log-every",
        type=int,
        default=plain.log_every,
        metavar="N",
        help=f"log all steps, after so many of them ({plain.log_every})",
    )
    command.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write TensorBoard's files here too"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.changes)
    launch = Launch(
        microbatch=arguments.microbatch,
        device=arguments.device,
        threads=arguments.threads,
        log_every=arguments.log_every,
        engine=arguments.engine,
        sharded=arguments.sharded,
        init=arguments.init,
        coordinator=arguments.coordinator,
        processes=arguments.processes,
        process=arguments.process,
    )
    train, test = (open_source(recipe, part, arguments.data) for part in PARTS)
    name = arguments.framework
    framework = load_framework(name, f"agc train in {name}", f"{name},weights")
    # Before the training begins: what its end needs.
    for package in ("safetensors.numpy", "rich.progress"):
        need(package, "agc train")
    if not hasattr(framework, "trainer"):
        raise ConfigError(f"agc train is not offered in {name} as yet")
    trainer = framework.trainer(recipe, launch)
    first = trainer.hosts.first
    show: list[Callable[[Any], None]] = []
    if first and arguments.tensorboard:
        show.append(tensorboard(arguments.tensorboard))

    def report(record: dict[str, Any]) -> None:
        for each in show:
            each(record)

    with _progress(recipe.steps, shown=first) as progress:
        show.append(_reporter(progress))
        training = Training(
            recipe,
            trainer,
            train,
            test,
            arguments.out,
            launch=launch,
            resume=arguments.resume,
            allow_changed=arguments.allow_changed,
            report=report,
        )
        try:
            with stop_signals() as stop:
                finished = training.run(stop)
        except NonFiniteError as error:
            print(f"agc: {error}", file=sys.stderr)
            return 1
    if finished:
        said = f"trained for {training.made} steps: {arguments.out}"
    else:
        said = f"stopped and saved after {training.made} steps; --resume goes on"
    if first:
        print(said)
    return 0 if finished else STOPPED


def _progress(steps: int, *, shown: bool) -> Any:
    """Return a bar, which is shown on terminals only, with one task of so many steps."""
    rich, console = need("rich.progress", "agc train"), need("rich.console", "agc train").Console()
    progress = rich.Progress(
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.description}"),
        rich.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
    progress.add_task("", total=steps)
    return progress


def _reporter(progress: Any) -> Callable[[dict[str, Any]], None]:
    """Return what shows each record of the log."""
    (task,) = progress.task_ids

    def report(record: dict[str, Any]) -> None:
        match record["type"]:
            case "start":
                progress.update(task, completed=record["step"])
            case "step":
                progress.update(task, completed=record["step"] + 1, description=_words(record))
            case "evaluation":
                progress.console.print(
                    f"step {record['step']}, {record['weights']} weights: "
                    f"top-1 {record['top1']:.2%}, top-5 {record['top5']:.2%}, "
                    f"loss {record['loss']:.4f} on {record['images']} images",
                    highlight=False,
                )

    return report


def _words(record: dict[str, Any]) -> str:
    words = [f"loss {record['loss']:.4f}", f"rate {record['rate']:.4g}"]
    if "clipped" in record:
        words.append(f"clipped {record['clipped']:.1%}")
    return ", ".join([*words, f"{record['images_per_second']:.0f} images/s"])
