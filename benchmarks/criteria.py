"""Compare every criterion with every recovery on one model: perplexity over the dense model's.

    python benchmarks/criteria.py MODEL --calibration text.txt --evaluate a.txt --out docs/recipes/criteria.md

All runs give every block the same width, which the default criterion chooses, so that runs differ only in which units
they keep and in how they compensate for the removed ones. Each result is printed as soon as it is there. `--out FILE`
writes the table between the markers `<!-- criteria SIZE -->` and `<!-- /criteria SIZE -->` of a Markdown file.
`--keep FILE` stores finished runs, which are not repeated.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from secateur import BlockStream, Options, calibration_rows, consecutive_rows, open_checkpoint
from secateur.checkpoints.expert_matrices import whole
from secateur.checkpoints.tokens import begins_with_bos
from secateur.criteria.choice import CRITERIA
from secateur.criteria.registry import SCORED_KINDS, Criteria, UnitScores
from secateur.fit.loop import refit
from secateur.fit.recovery import Method, recovery_of
from secateur.measure import perplexity
from secateur.measure.loading import load
from secateur.model.axes import Width
from secateur.model.rows import Rows
from secateur.model.surgery import assign, narrow
from secateur.model.units.channels import CHANNELS
from secateur.model.units.heads import HEADS
from secateur.plan.meters import parameter_meter
from secateur.plan.plan import plan
from secateur.plan.problem import Plan, PlanProblem
from secateur.steps.survey_model import split_survey_rows
from secateur.survey.gradients import gradient_scores
from secateur.survey.survey import survey
from secateur.write.slice import slice_fitted
from tables import put

RECOVERIES = ("none", "bias", "paper", "refit")
"""Columns of the table."""
EARLY = [("second-moment", "paper", when) for when in ("before", "both")]
"""Runs below the table: the paper's recovery before the choice of units, with the paper's criterion only."""
GRID = [(criterion, recovery, "after") for criterion in CRITERIA for recovery in RECOVERIES] + EARLY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluate", action="append", required=True)
    parser.add_argument("--samples", type=int, default=Options.samples)
    parser.add_argument("--length", type=int, default=Options.length)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--ridge", type=float, default=Options.ridge)
    parser.add_argument("--keep", type=Path, help="a .json file for finished runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    bench = Bench(arguments)
    kept = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {"runs": {}}
    decided = bench.plan(arguments.sparsity, kept.get("width"))
    width = decided.widths[0]
    kept["width"] = [width.kv_groups, width.heads_per_group, width.channels]
    names = [Path(source).stem for source in arguments.evaluate]
    said = (
        f"{Path(arguments.model).name}, {arguments.samples} x {arguments.length} tokens of "
        f"{Path(arguments.calibration).name}, {arguments.tokens:,} tokens of each text in rows of 128, ridge "
        f"{arguments.ridge}; every block {width.heads} heads, {width.kv_groups} key/value heads, {width.channels} "
        f"channels ({decided.sparsity:.1%} of the blocks' parameters removed); torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads. Dense: "
        + ", ".join(f"{name} {value:.2f}" for name, value in zip(names, bench.dense, strict=True))
        + f". Cells: {' / '.join(names)}, over dense"
    )
    print(said, flush=True)
    for criterion, recovery, when in GRID:
        run = f"{criterion}, {recovery}, {when}"
        if run not in kept["runs"]:
            kept["runs"][run] = bench.ratios(decided, criterion, recovery, when)
            print(f"{run}: {spelled(kept['runs'][run])}", flush=True)
        if arguments.keep:
            arguments.keep.write_text(json.dumps(kept, indent=1))
        if arguments.out:
            put(arguments.out, f"criteria {arguments.sparsity:g}", table(said, kept["runs"]))


def table(said: str, runs: dict[str, list[float]]) -> list[str]:
    """Return the lines of the table, with cells for the finished runs."""
    lines = [said, "", "| criterion | " + " | ".join(RECOVERIES) + " |", "|---" * (len(RECOVERIES) + 1) + "|"]
    for criterion in CRITERIA:
        cells = [spelled(runs.get(f"{criterion}, {recovery}, after")) for recovery in RECOVERIES]
        if any(cells):
            lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    early = [
        (f"{recovery} {when} the choice" if when == "before" else f"{recovery} before and after it", run)
        for criterion, recovery, when in EARLY
        if (run := runs.get(f"{criterion}, {recovery}, {when}"))
    ]
    if early:
        lines += ["", f"{EARLY[0][0]}: " + "; ".join(f"{what} {spelled(run)}" for what, run in early)]
    return lines


def spelled(ratios: list[float] | None) -> str:
    """Format ratios for a cell: two decimals below 10, none above."""
    return " / ".join(f"{r:.2f}" if r < 10 else f"{r:,.0f}" for r in ratios or [])


class Bench:
    """The model, its calibration rows and the texts that are scored."""

    def __init__(self, arguments: argparse.Namespace):
        checkpoint = open_checkpoint(arguments.model)
        tokenizer, vocabulary = checkpoint.tokenizer(), checkpoint.config.vocab_size
        self.stream, self.ridge = BlockStream(checkpoint), arguments.ridge
        self.text = calibration_rows(
            tokenizer,
            arguments.calibration,
            samples=arguments.samples,
            length=arguments.length,
            seed=0,
            vocab_size=vocabulary,
        )
        self.rows = Rows.of(self.text)
        self.fitted = self.rows if begins_with_bos(tokenizer) else self.rows.with_openings()
        self.texts = [
            consecutive_rows(tokenizer, source, length=128, tokens=arguments.tokens, vocab_size=vocabulary).ids
            for source in arguments.evaluate
        ]
        self.network = load(checkpoint, torch.float32, torch.device("cpu"))
        self.dense = self._score()
        self.scores: dict[str, UnitScores] = {}

    def plan(self, sparsity: float, width: list[int] | None) -> Plan:
        """Return a plan with one width for all blocks: the one given (KV groups, heads, channels) or the cheapest."""
        counted = parameter_meter(self.stream)
        wish = PlanProblem(
            self.stream.blocks, range(len(self.stream)), parameters=counted, target=sparsity, meter=counted
        )
        if width:
            return wish.plan(
                dict.fromkeys(wish.pruned_blocks, Width(dict(zip((*HEADS, CHANNELS), width, strict=True))))
            )
        few, probe_rows = split_survey_rows(self.text)
        return plan(wish, "uniform", survey(self.stream, few, probe_rows=probe_rows, ridge=self.ridge))

    def ratios(self, decided: Plan, criterion: str, recovery: str, when: str) -> list[float]:
        """Return the ratio of a run's perplexity to the dense model's on each text."""
        if Criteria(criterion).needs_gradients and criterion not in self.scores:
            self.scores[criterion] = gradient_scores(self.stream, self.rows, criterion)
        moment = {"when": when} if recovery == "paper" else {}
        method = Method(
            Criteria(criterion, self.scores.get(criterion)), recovery_of(recovery, ridge=self.ridge, **moment)
        )
        layers = self.network.get_submodule(self.stream.family.blocks)
        for block in refit(self.stream, decided, self.fitted if method.recovery.fits else self.rows, method=method):
            tensors = {name: whole(tensor).float() for name, tensor in slice_fitted(self.stream, block).items()}
            layer = layers[block.index]
            for module in (self.stream.blocks[block.index].module(kind) for kind in SCORED_KINDS):
                if module.bias is None:
                    # The previous run may have added a bias.
                    assign(layer, module.bias_name, None)
            narrow(layer, self.stream.blocks[block.index], tensors, decided.widths[block.index])
        return [value / base for value, base in zip(self._score(), self.dense, strict=True)]

    def _score(self) -> list[float]:
        return [perplexity(self.network, ids).perplexity for ids in self.texts]


if __name__ == "__main__":
    main()
