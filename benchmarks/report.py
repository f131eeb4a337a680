"""Turn result files into a table, a figure and a verdict.

``python -m benchmarks.report`` reads ``benchmarks/results/*.json`` and writes ``README.md`` and
``speed.svg`` beside them; with ``--check`` it exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agc.files import write_text
from benchmarks.common import CONDITIONS, grid, over_turns

__all__ = ["TARGETS", "Results", "main", "verdicts"]

HERE = Path(__file__).parent
FRAMEWORKS = ("torch", "jax", "tensorflow")
DATA = "data"
"""Name of the file of input pipelines, which is of no framework."""
TITLES = {
    "torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow",
    "nfnet-f0": "NFNet-F0", "gpt2-small": "GPT-2 small",
    "all": "all clipped", "none": "none clipped",
    "timm": "timm", "pytorch_optimizer": "pytorch_optimizer", "optax": "optax", "bound": "*memory bound*",
    "new arrays": "*bound of new arrays*", "two operations": "*two operations*", "naive": "naive port", "ours": "**agc**", "ours xla": "**agc**, XLA", "naive xla": "naive port, XLA",
    "F0": "NFNet-F0", "forward": "forward", "plain functions": "plain functions",
    "standardisation": "weight standardisation alone", "step": "training step",
    "data": "agc.data", "torchvision": "torchvision", "tf.data": "tf.data",
    "sam": "SAM", "fraction": "SAM, fraction 0.2",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A peer's time must be at least ``ratio`` times ours, for every model; a bound is a peer."""

    framework: str
    peer: str
    condition: str
    ratio: float
    base: str = "ours"


TARGETS = (
    Target("torch", "timm", "all", 1.0),
    Target("torch", "timm", "none", 1.0),
    Target("torch", "pytorch_optimizer", "all", 1.0),
    Target("torch", "pytorch_optimizer", "none", 1.0),
    Target("torch", "bound", "all", 0.6),
    Target("torch", "bound", "none", 0.75),
    Target("jax", "optax", "all", 1.0),
    Target("jax", "optax", "none", 1.0),
    Target("jax", "bound", "all", 0.6),
    Target("jax", "bound", "none", 0.6),
    Target("tensorflow", "naive", "all", 2.0),
    Target("tensorflow", "naive", "none", 2.0),
    Target("tensorflow", "naive xla", "all", 2.0, "ours xla"),
    Target("tensorflow", "naive xla", "none", 2.0, "ours xla"),
    Target("tensorflow", "new arrays", "all", 0.6),
    Target("tensorflow", "new arrays", "none", 0.6),
)
BOUNDS = ("bound", "new arrays", "two operations")
"""Contestants that do no more than they must: of these, the ratio is a share of a bound."""
NOISE = 0.03
"""Two identical programs differ by this much from run to run, so a ratio this close to 1 is 1."""
MEMORY = 0.05
"""Largest peak of extra memory allowed in PyTorch, as a share of the parameters."""

PEERS = {"torch": "timm", "jax": "plain functions"}
"""Framework to the peer that our NFNet-F0 is compared with."""
SAM_COSTS = {"sam": 2.1, "fraction": 1.25}
"""Longest time allowed for a training step, as a multiple of one without SAM."""
SAM_MEMORY = 1.0
"""Largest peak of extra memory allowed for SAM, in copies of the perturbed weights."""

Case = tuple[str, str, str]


class Results:
    """Times by framework, model and condition, from one run of all."""

    def __init__(self, folder: Path) -> None:
        self.machines: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, dict[str, Any]] = {}
        self.memory: dict[tuple[str, str, str], float] = {}
        self.model_peaks: dict[tuple[str, str], float] = {}
        self.sam_peaks: dict[str, float] = {}
        self.images: int = 0
        self._turns: dict[Case, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
        for framework in (*FRAMEWORKS, DATA):
            path = folder / f"{framework}.json"
            if not path.exists():
                continue
            data = json.loads(path.read_text(encoding="utf-8"))
            self.machines[framework] = data["machine_info"]
            self.commits[framework] = {**data["commit_info"], "date": data["datetime"][:16]}
            for benchmark in data["benchmarks"]:
                case = benchmark["extra_info"]
                if "peak_memory" in case and case["model"] == "F0":
                    self.model_peaks[framework, case["contestant"]] = case["peak_memory"]
                    continue
                if "peak_memory" in case and case["contestant"] == "sam":
                    self.sam_peaks[framework] = case["peak_memory"]
                    continue
                if "peak_memory" in case:
                    key = case["model"], case["condition"], case["contestant"]
                    self.memory[key] = case["peak_memory"]
                    continue
                self.images = case.get("images", self.images)
                place = framework, case["model"], case["condition"]
                self._turns[place][case["contestant"]][case["turn"]] = benchmark["stats"]

    @property
    def frameworks(self) -> list[str]:
        """The frameworks that were measured."""
        return [framework for framework in FRAMEWORKS if framework in self.machines]

    def pipelines(self) -> list[Case]:
        """Return the input pipelines that ours is compared with, in the order they were run."""
        return [case for case in self._turns if case[0] == DATA]

    def images_per_second(self, case: Case, contestant: str) -> float:
        """Return how many images a pipeline makes in a second of one core, at its fastest."""
        return 1e3 * self.images / self.milliseconds(case, contestant)

    def cases(self, framework: str) -> list[Case]:
        """Return the cases of clipping of a framework in the order they were run."""
        return [case for case in self._turns if case[0] == framework and case[2] in CONDITIONS]

    def models(self, framework: str) -> list[Case]:
        """Return the cases of whole models of a framework in the order they were run."""
        return [case for case in self._turns if case[0] == framework and case[1] == "F0"]

    def contestants(self, cases: Sequence[Case]) -> list[str]:
        """Return the contestants of some cases in the order they were run."""
        return list(dict.fromkeys(c for case in cases for c in self._turns[case]))

    def milliseconds(self, case: Case, contestant: str) -> float:
        """Return the fastest round of all turns."""
        return min(self.fastest_by_turn(case, contestant))

    def fastest_by_turn(self, case: Case, contestant: str) -> list[float]:
        """Return the fastest round of each turn, in milliseconds."""
        return [1e3 * turn["min"] for turn in self._turns[case][contestant].values()]

    def ratio(self, case: Case, peer: str, base: str = "ours") -> float:
        """Return a peer's time as a multiple of the base's.

        The fastest rounds of each turn are compared; the result is the median over the turns.
        """
        ours, theirs = self._turns[case][base], self._turns[case][peer]
        return over_turns(*([turns[turn]["min"] for turn in ours] for turns in (theirs, ours)))

    def model_memory(self, framework: str, contestant: str) -> float | None:
        """Return the peak memory of a training step of F0, in copies of the parameters."""
        return self.model_peaks.get((framework, contestant))

    def standardisation(self) -> float | None:
        """Return the share of weight standardisation in a training step of PyTorch, if measured."""
        case = ("torch", "F0 in training", "step")
        if case not in self._turns:
            return None
        return self.milliseconds(case, "standardisation") / self.milliseconds(case, "ours")

    def sam_cost(self, framework: str, contestant: str) -> float:
        """Return the time of a training step, as a multiple of one without SAM."""
        return self.ratio(_step(framework), contestant, "plain")

    def sam_passes(self, framework: str, contestant: str) -> float | None:
        """Return the same of the two passes of such a step alone, if they were measured."""
        bare = f"bare {contestant}"
        measured = bare in self.contestants([_step(framework)])
        return self.sam_cost(framework, bare) if measured else None


def _step(framework: str) -> Case:
    """Return the case in which SAM's cost is measured."""
    return framework, "convnet", "step"


def verdicts(results: Results) -> list[tuple[str, bool]]:
    """Return each target in words, with the number reached, and whether it is met."""
    targets = []
    for target in TARGETS:
        for case in results.cases(target.framework):
            if case[2] == target.condition:
                text, ratio = _reached(results, case, target)
                # Noise makes one of two equal programs slower.
                slack = NOISE if target.ratio == 1 else 0.0
                targets.append((text, ratio >= target.ratio * (1 - slack)))
    for framework in results.frameworks:
        for contestant, most in SAM_COSTS.items():
            cost = results.sam_cost(framework, contestant)
            passes = results.sam_passes(framework, contestant)
            least = "" if passes is None else f"; its two passes alone {passes:.2f}"
            text = (
                f"{TITLES[framework]}, {TITLES[contestant]}: {cost:.2f} times a step without "
                f"(at most {most:g}{least})"
            )
            targets.append((text, cost <= most))
    for framework in results.frameworks:
        for case in results.models(framework):
            peer = PEERS[framework]
            ratio = results.ratio(case, peer)
            text = f"{_label(case)}: {TITLES[peer]} takes {ratio:.2f} times as long (at least 1)"
            targets.append((text, ratio >= 1 - NOISE))
        peer = PEERS.get(framework, "")
        ours, theirs = (results.model_memory(framework, who) for who in ("ours", peer))
        if ours is not None and theirs is not None:
            text = (
                f"{TITLES[framework]}, NFNet-F0, training step: memory {ours:.2f} copies of the parameters, "
                f"{TITLES[peer]} {theirs:.2f} (at most as much)"
            )
            targets.append((text, ours <= theirs * (1 + NOISE)))
    share = results.standardisation()
    if share is not None:
        text = (
            f"PyTorch, NFNet-F0 in training (16 images of 192x192): weight standardisation is {100 * share:.1f} % "
            f"of a step (at most {100 * NOISE:g} %, which cannot be told from noise)"
        )
        targets.append((text, share <= NOISE))
    for framework, copies in results.sam_peaks.items():
        text = (
            f"{TITLES[framework]}, SAM: extra memory {copies:.2f} copies of the weights "
            f"(at most {SAM_MEMORY:g})"
        )
        targets.append((text, round(copies, 2) <= SAM_MEMORY))
    for (model, condition, contestant), share in results.memory.items():
        if contestant == "ours" and condition in CONDITIONS:
            text = (
                f"{_label(('torch', model, condition))}: extra memory {100 * share:.2f} % of the "
                f"parameters (at most {100 * MEMORY:g} %)"
            )
            targets.append((text, share <= MEMORY))
    return targets


def _reached(results: Results, case: Case, target: Target) -> tuple[str, float]:
    """Return a target in words, and the ratio; NaN, which misses, if the peer was not measured."""
    bound = target.peer in BOUNDS
    asked = f"at least {100 * target.ratio:g} %" if bound else f"at least {target.ratio:g}"
    if target.peer not in results.contestants([case]):
        return (
            f"{_label(case)}: {TITLES[target.peer].strip('*')} was not measured ({asked})",
            math.nan,
        )
    ratio = results.ratio(case, target.peer, target.base)
    if bound:
        text = f"{100 * ratio:.1f} % of the speed of the {TITLES[target.peer].strip('*')} ({asked})"
    else:
        measured = results.contestants([case])
        own = next(name for name in ("new arrays", "bound") if name in measured)
        most, least = results.ratio(case, target.peer, own), TITLES[own].strip("*")
        text = f"{TITLES[target.peer]} takes {ratio:.2f} times as long ({asked}; at the {least} {most:.2f})"
    return f"{_label(case)}: {text}", ratio


def _label(case: Case) -> str:
    return ", ".join(TITLES[part] for part in case)


def table(results: Results, framework: str) -> str:
    """Return a Markdown table: milliseconds, and in brackets the multiple of our time."""
    cases = results.cases(framework)
    rows = [
        [TITLES[framework], *(f"{TITLES[model]}, {TITLES[c]}" for _, model, c in cases)],
        ["---", *("---:" for _ in cases)],
    ]
    for contestant in results.contestants(cases):
        row = [TITLES[contestant]]
        for case in cases:
            turns = results.fastest_by_turn(case, contestant)
            if contestant in BOUNDS:
                row.append(f"{min(turns):.1f} to {max(turns):.1f} ms")
                continue
            ratio = f" ({results.ratio(case, contestant):.2f}x)" if contestant != "ours" else ""
            row.append(f"{min(turns):.1f} ms{ratio}")
        rows.append(row)
    if framework == "torch" and results.memory:
        for contestant in ("ours", "timm", "pytorch_optimizer"):
            shares = [results.memory.get((*case[1:], contestant)) for case in cases]
            cells = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
            rows.append([f"extra memory, {TITLES[contestant]}", *cells])
    return grid(rows)


def model_table(results: Results) -> str:
    """Return a Markdown table: NFNet-F0 forward and a training step, in milliseconds."""
    rows = [["NFNet-F0", "forward", "training step", "memory of a step"], ["---", *3 * ["---:"]]]
    for framework in results.frameworks:
        cases = results.models(framework)
        for contestant in results.contestants(cases):
            row = [f"{TITLES[framework]}: {TITLES[contestant]}"]
            for case in cases:
                time = f"{results.milliseconds(case, contestant):.0f} ms"
                ratio = results.ratio(case, contestant)
                row.append(time if contestant == "ours" else f"{time} ({ratio:.2f}x)")
            memory = results.model_memory(framework, contestant)
            rows.append([*row, "" if memory is None else f"{memory:.2f} x parameters"])
    return grid(rows)


def sam_table(results: Results) -> str:
    """Return a Markdown table: a training step with SAM, as a multiple of one without."""
    titles = [title for name in SAM_COSTS for title in (TITLES[name], "its two passes alone")]
    rows = [["training step", *titles], ["---", *len(titles) * ["---:"]]]
    for framework in results.frameworks:
        row = [TITLES[framework]]
        for name in SAM_COSTS:
            passes = results.sam_passes(framework, name)
            row.append(f"{results.sam_cost(framework, name):.2f}x")
            row.append("" if passes is None else f"{passes:.2f}x")
        rows.append(row)
    return grid(rows)


def data_table(results: Results) -> str:
    """Return a Markdown table: images per second of a core, ours and each peer's."""
    rows = [["the same work as", "its images/s of a core", "**agc.data**'s", "share"]]
    rows.append(["---", "---:", "---:", "---:"])
    for case in results.pipelines():
        speeds = [results.images_per_second(case, name) for name in ("peer", "ours")]
        share = f"{results.ratio(case, 'peer'):.2f}"
        rows.append([TITLES[case[2]], *(f"{speed:.0f}" for speed in speeds), share])
    return grid(rows)


def document(results: Results) -> str:
    """Return the whole Markdown page."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks.report`. Times are the fastest round; in brackets, how many "
        "times our time a peer takes (fastest rounds of a turn; median over the turns). Bounds, in italics, are given for the "
        "fastest and the slowest turn: so much does the machine itself vary. The *memory bound* reads "
        "every weight and gradient once with all cores and, where everything is clipped, writes the gradients in "
        "place: no implementation can be faster. The *bound of new arrays* is TensorFlow's own: one fused "
        "operation that reads both and writes all gradients into new arrays. *Two operations* are PyTorch's own, "
        "`vector_norm` of each tensor in float32 and `mul_` of each gradient that is clipped, without any decision.",
        "![Time relative to ours](speed.svg)",
    ]
    parts += [table(results, framework) for framework in results.frameworks]
    parts.append("## SAM\n\n" + sam_table(results))
    parts.append("## Models\n\n" + model_table(results))
    if results.pipelines():
        parts.append("## Images\n\n" + data_table(results))
    marks = {True: "met", False: "**missed**"}
    rows = [("target", "verdict"), ("---", "---")]
    rows += [(text, marks[met]) for text, met in verdicts(results)]
    parts.append("## Targets\n\n" + grid(rows))
    parts.append("## Provenance")
    for framework, machine in results.machines.items():
        commit = results.commits[framework]
        versions = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        changed = ", with changes" if commit["dirty"] else ""
        parts.append(
            f"**{TITLES[framework]}** ({commit['date']}): {machine['cpu']}, {machine['cores']} cores, "
            f"{machine['system']} {machine['machine']}; Python {machine['python']}, {versions}; "
            f"commit {str(commit['id'])[:12]}{changed}; `{machine['command']}`"
        )
    return "\n\n".join(parts) + "\n"


def figure(results: Results) -> str:
    """Return an SVG: for every case, the peers' time relative to ours."""
    import io

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    from agc.cli.pictures import paper

    bars = [
        (f"{_label(case)}: {peer}", results.ratio(case, peer))
        for framework in results.frameworks
        for case in results.cases(framework)
        for peer in results.contestants([case])
        if not peer.startswith("ours") and peer not in BOUNDS
    ]
    with paper(7, 0.5 + 0.2 * len(bars)) as drawing:
        axes = drawing.subplots()
        labels, ratios = zip(*bars, strict=True)
        axes.barh(range(len(bars)), ratios, color="#4477aa")
        axes.axvline(1, color="0.5", lw=1)
        axes.set_yticks(range(len(bars)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("time, relative to agc")
        for row, ratio in enumerate(ratios):
            axes.text(ratio, row, f" {ratio:.1f}", va="center")
        buffer = io.StringIO()
        FigureCanvasSVG(drawing).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; return 1 if ``--check`` was asked for and a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if not results.machines:
        print(f"there are no results in {options.results}; run: python -m benchmarks")
        return 1
    write_text(options.results / "README.md", document(results))
    write_text(options.results / "speed.svg", figure(results))
    targets = verdicts(results)
    for text, met in targets:
        print("met   " if met else "MISSED", text)
    absent = [framework for framework in FRAMEWORKS if framework not in results.machines]
    if absent:
        print("MISSED no results of", ", ".join(absent))
    return int(options.check and (bool(absent) or not all(met for _, met in targets)))


if __name__ == "__main__":
    sys.exit(main())
