"""Options that only the tables of the paper vary; they have a panel at the end of the help."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.base.errors import SecateurError
from secateur.base.options import option
from secateur.criteria.choice import IDENTITY

if TYPE_CHECKING:
    from secateur.commands.options import Options as Base
    from secateur.paper.similar_heads import Similarity
else:
    Base = object

PAPER = "The paper's variants"
SIMILARITY = "similarity"
"""Criterion that compares heads in pairs: a threshold says which of them are too many."""
LARGEST = math.log(2)
"""The largest threshold: the Jensen-Shannon divergence of two distributions that share nothing, in nats."""


@dataclass(frozen=True)
class PaperOptions(Base):
    """Options that `secateur.commands.options` adds to `Options`."""

    tau: float | None = option(
        None,
        PAPER,
        "Threshold of --criterion similarity, in nats, for example 0.19: two heads are similar if the Jensen-Shannon "
        "divergence of their attention weights is below it.",
        default_text="none",
    )
    sigma: str | None = option(
        None,
        PAPER,
        "Covariance of the inputs that --criterion second-moment uses. data: of the calibration rows; identity: the "
        "identity matrix; random: of random token ids.",
        default_text="data",
        choices=("data", "identity", "random"),
    )
    recover: str = option(
        "after",
        PAPER,
        "The time at which --recovery paper fits the weights. after: after the units to remove are chosen; before: "
        "before they are chosen; both: at both times.",
        choices=("after", "before", "both"),
        fit_only=True,
    )
    refit_calibration: str | None = option(
        None,
        PAPER,
        "Text that only the recovery uses, named as in --calibration. Units are then chosen on --calibration, and "
        "weights are fitted on this text.",
        default_text="the text of --calibration",
        may_name_file=True,
        fit_only=True,
    )
    refit_samples: int | None = option(
        None,
        PAPER,
        "Number of rows that only the recovery uses. Units are then chosen on other rows, whose number is --samples.",
        default_text="the rows that units are chosen on",
        minimum=1,
        fit_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_similarity()
        if self.recover != PaperOptions.recover and self.recovery != "paper":
            raise SecateurError(
                "recover is an option of --recovery paper: leave --recover out, or add --recovery paper"
            )
        if self.sigma is not None and not self.parsed_criterion.uses("second-moment"):
            raise SecateurError(
                f"sigma is an option of --criterion second-moment, not of {self.criterion}: leave --sigma out"
            )
        if self.own_refit_rows and self.recovery == "none":
            raise SecateurError("--recovery none fits nothing: leave --refit-samples and --refit-calibration out")

    def _check_similarity(self) -> None:
        """Check that a threshold is given for similarity, and only for it.

        Raises:
            SecateurError: One is given without the other, or another option sets how much to remove.
        """
        choice = self.parsed_criterion
        if choice.preselection != SIMILARITY:
            if self.tau is not None:
                raise SecateurError("tau is an option of --criterion similarity: add that, or leave --tau out")
            return
        if self.tau is None:
            raise SecateurError("similarity needs a threshold: add --tau, for example 0.19")
        if not 0 < self.tau <= LARGEST:
            raise SecateurError(
                f"tau is {self.tau}; it must be above 0 and at most ln 2 = {LARGEST:.4f}, for example 0.19"
            )
        if "heads" not in self.modules:
            raise SecateurError("similarity compares heads: add heads to --modules, or choose another criterion")
        if choice.preselection_only:
            self._check_alone()

    def _check_alone(self) -> None:
        """Check that only the threshold sets how much to remove."""
        given = {
            "--sparsity": self.sparsity,
            "--target": self.target,
            "--plan": self.plan,
            "--widths with a file": self.widths_from_file,
        }
        if said := next((name for name, value in given.items() if value), None):
            raise SecateurError(f"--tau and {said} both set how much to remove; leave one of them out")
        if self.widths == "uniform" or self.output_format.uniform:
            raise SecateurError(
                "similarity may remove more heads from one block than from another, but the stock format and --widths "
                "uniform need equal numbers: use --format hf without --widths uniform, or --criterion "
                "similarity+surgeon"
            )

    @property
    def own_refit_rows(self) -> bool:
        """Whether the recovery is fitted to other rows than those by which units are chosen."""
        return self.refit_samples is not None or self.refit_calibration is not None

    @property
    def refit_rows(self) -> int | None:
        """See `Options.refit_rows`."""
        return (self.refit_samples or self.samples) if self.own_refit_rows else None

    @property
    def refit_option(self) -> str:
        """See `Options.refit_option`."""
        return "refit-samples" if self.refit_samples else "samples"

    @property
    def sources(self) -> tuple[str, str]:
        """See `Options.sources`."""
        return self.calibration, self.refit_calibration or self.calibration

    @property
    def criterion_name(self) -> str:
        """See `Options.criterion_name`."""
        return self.criterion.replace("second-moment", IDENTITY) if self.sigma == "identity" else self.criterion

    @property
    def chooses_on_random_ids(self) -> bool:
        """See `Options.chooses_on_random_ids`."""
        return self.sigma == "random"

    @property
    def survey_key(self) -> dict[str, Any]:
        """See `Options.survey_key`."""
        return super().survey_key | ({} if self.preselection is None else {"tau": self.tau})

    @property
    def preselection(self) -> "Similarity | None":
        """See `Options.preselection`."""
        if self.parsed_criterion.preselection != SIMILARITY or self.tau is None:
            return None
        # Not at the top: the help does not wait for torch.
        from secateur.paper.similar_heads import Similarity

        return Similarity(self.tau, decides=self.parsed_criterion.preselection_only)
