"""A step of `prune --vocabulary auto`: the number of tokens at which tokens and blocks together cost least.

Every number of tokens leaves the rest of the target to the blocks. The loss from cut tokens is measured: bits per byte
of text whose tokens were not counted, split by the cut tokenizer. The loss from narrower blocks is the estimated loss
of the plan. Both are losses per byte of text, so that the number with the smallest sum can be chosen.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from secateur.base.errors import SecateurError
from secateur.base.progress import Silent
from secateur.commands.draw_rows import resample_rows
from secateur.commands.open_model import OpenRun, open_cut
from secateur.commands.request import check_request
from secateur.commands.survey_model import Findings
from secateur.commands.vocabulary import Cutter, KeptVocabulary, TokenChoice
from secateur.model.checkpoint import Checkpoint
from secateur.model.stream import BlockStream
from secateur.plan.plan import plan
from secateur.plan.problem import PlanProblem
from secateur.survey.curves import Survey
from secateur.text.draw import CalibrationRows, draw
from secateur.vocabulary.bits_per_byte import tokens_per_byte
from secateur.vocabulary.wanted import Wanted, parse_vocabulary

CHOICES = 6
"""Numbers of tokens that are compared, from the tokens of the text's scripts down."""


def choose_tokens(
    run: OpenRun, rows: CalibrationRows, findings: Findings, *, resample: bool = True
) -> tuple[OpenRun, CalibrationRows]:
    """Return the run with the cheapest number of tokens, and rows of these tokens; both as they are without `auto`.

    Args:
        run: The result of `open_model`, with all tokens of the text's scripts.
        rows: Its calibration rows, without resampled rows.
        findings: Its survey, which also holds with fewer tokens, because the blocks are the same.
        resample: Add the resampled rows that the fit needs.
    """
    if not run.options.chooses_tokens or findings.survey is None:
        return run, rows
    search = _Search(run, findings.survey)
    choices = [TokenChoice(**one) for one in run.services.saved_result("tokens", search.as_json)]
    run = search.run_with(min(choices, key=lambda one: one.loss), choices)
    drawn = draw(run.stream, run.tokenizer, run.row_request, begins_with_bos=run.begins_with_bos)
    return run, resample_rows(run, drawn) if resample else drawn


@dataclass(frozen=True)
class _Search:
    """The numbers of tokens that are compared, and what each costs."""

    run: OpenRun
    """The run with all tokens of the text's scripts."""
    survey: Survey

    def run_with(self, choice: TokenChoice, choices: list[TokenChoice]) -> OpenRun:
        """Return the run with the tokens of a choice."""
        cut, whole = self._cut(choice.tokens), self._whole
        if cut is whole:
            return self.run
        vocabulary = KeptVocabulary(
            self.run.options.vocabulary,
            (whole.config.vocab_size, choice.tokens),
            cut.cut_entries,
            (choice.bits_before, choice.bits_per_byte),
            tuple(choices),
        )
        self.run.watcher.note(vocabulary.describe())
        return open_cut(self.run, cut, vocabulary)

    def as_json(self) -> list[dict[str, float]]:
        """Return what every number of tokens costs, as JSON holds it."""
        before = self._bits(self._whole)
        return [asdict(one) for tokens in self._numbers() if (one := self._cost(tokens, before))]

    def _cost(self, tokens: int, before: float) -> TokenChoice | None:
        """Return what a number of tokens and the rest of the target cost; None if it leaves no rest.

        Args:
            tokens: Number of tokens, a multiple of 64.
            before: Bits per byte with the whole vocabulary.
        """
        try:
            cut = self._cut(tokens)
            found = plan(self._problem(cut), self.run.options.widths, self.survey)
        except SecateurError:
            return None
        blocks = (found.cost or 0.0) * self._tokens_per_byte
        choice = TokenChoice(tokens, before, self._bits(cut), blocks)
        self.run.watcher.note(choice.describe())
        return choice

    def _numbers(self) -> Iterator[int]:
        """Yield numbers of tokens in a geometric series, from all tokens of the text's scripts to the smallest number.

        The smallest number leaves just enough parameters above the target that blocks must still be pruned. Every token
        has the same size, so that a model with `multiple` fewer tokens shows how small this number is.
        """
        most, multiple = self.run.stream.checkpoint.config.vocab_size, self._cutter.selection.multiple
        try:
            problem = self._problem(self._cut(most - multiple))
        except SecateurError:
            yield most
            return
        here = self.run.request.problem
        token_size = (here.meter.dense - problem.meter.dense) / multiple
        enough = most - (here.meter.dense - here.budget) / token_size
        fewest = max(enough, 1) + multiple
        numbers = [most * (fewest / most) ** (step / (CHOICES - 1)) for step in range(CHOICES)]
        yield from dict.fromkeys(math.ceil(number / multiple) * multiple for number in numbers)

    @cached_property
    def _cutter(self) -> Cutter:
        """The whole model and the text, read again, because the run holds neither."""
        wanted = parse_vocabulary(self.run.options.vocabulary)
        assert wanted is not None
        return Cutter.of(self._whole, self.run.options, wanted)

    @property
    def _whole(self) -> Checkpoint:
        """The checkpoint with its whole vocabulary."""
        return self.run.stream.checkpoint.original

    @cached_property
    def _tokens_per_byte(self) -> float:
        """Tokens per byte of the text by which losses are measured; the survey's losses are per token."""
        return tokens_per_byte(self.run.tokenizer, self._cutter.held_out)

    def _cut(self, tokens: int) -> Checkpoint:
        """Return the checkpoint with a number of tokens.

        Raises:
            SecateurError: More tokens than this are always kept.
        """
        here = self.run.stream.checkpoint
        with self.run.processes.first_rank_first():
            same = tokens == here.config.vocab_size
            return here if same else self._cutter.cut(self._cutter.choose(Wanted(number=tokens)))

    def _problem(self, cut: Checkpoint) -> PlanProblem:
        """Return the problem of the plan with fewer tokens.

        Raises:
            SecateurError: The tokens alone meet the target, or blocks cannot make up for the rest.
        """
        services = replace(self.run.services, watcher=Silent())
        stream = BlockStream(cut, device=self.run.stream.device, services=services)
        return check_request(stream, self.run.options, self.run.dtype).problem

    def _bits(self, checkpoint: Checkpoint) -> float:
        """Return the bits per byte of the text that was not counted."""
        return self._cutter.bits_per_byte(checkpoint, self.run.stream.device, self.run.services)
