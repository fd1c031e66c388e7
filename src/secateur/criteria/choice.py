"""Which criterion chooses the heads and which the channels, as a person writes it."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

from secateur.base.errors import SecateurError
from secateur.model.structure import KINDS, Kind

CRITERIA: tuple[str, ...] = (
    *("surgeon", "second-moment", "wanda", "flap-wifv", "flap-ifv", "flap-wifn", "l1", "l2", "random"),
    *("llm-pruner-vector", "llm-pruner-element1", "llm-pruner-element2"),
)
IDENTITY = "second-moment-identity"
"""What second-moment is with Σ = I, which a person writes as an option of its own."""
SIMILARITY = "similarity"
"""The one that looks at heads in pairs: a threshold says which of them are too many."""
LARGEST = math.log(2)
"""The largest threshold: the Jensen-Shannon divergence of two distributions that share nothing, in nats."""


@dataclass(frozen=True)
class Choice:
    """One criterion for each kind of unit."""

    heads: str
    """Orders the heads; `similarity` alone also decides how many of each block go."""
    channels: str | None
    """None: they stay."""
    similar: bool
    """Heads that resemble another one go first."""

    @property
    def settles(self) -> bool:
        """Similarity alone decides about heads, their number included."""
        return self.heads == SIMILARITY

    @property
    def alone(self) -> bool:
        """Nothing but similar heads goes."""
        return self.settles and self.channels is None

    def of(self, kind: Kind) -> str:
        """The criterion for one kind."""
        return self.heads if kind == "heads" or self.channels is None else self.channels

    def uses(self, criteria: Container[str]) -> bool:
        """Whether any of its criteria is one of these."""
        return any(self.of(kind) in criteria for kind in KINDS)


def parse_choice(text: str) -> Choice:
    """Read a criterion: `X` for both, `heads=X,channels=Y`, and for heads `similarity` or `similarity+X`.

    Raises:
        SecateurError: it is none of these.
    """
    if "=" not in text:
        heads = _heads(text, text)
        # `similarity+X` is the paper's combination: X for channels too.
        rest = None if heads.settles else heads.heads
        return Choice(heads.heads, rest, heads.similar)
    parts = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(parts) != set(KINDS) or text.count(",") != 1:
        raise SecateurError(f"criterion is '{text}'; a pair is written heads=X,channels=Y")
    if parts["channels"] not in (*CRITERIA, IDENTITY):
        raise SecateurError(
            f"criterion is '{text}'; that of channels must be one of {', '.join(CRITERIA)}"
            + (": similarity is between heads" if SIMILARITY in parts["channels"] else "")
        )
    heads = _heads(parts["heads"], text)
    return Choice(heads.heads, parts["channels"], heads.similar)


def _heads(name: str, text: str) -> Choice:
    """The part about heads."""
    first, plus, then = name.partition("+")
    scores = (*CRITERIA, IDENTITY)
    known = first in (*scores, SIMILARITY) if not plus else first == SIMILARITY and then in scores
    if not known:
        raise SecateurError(
            f"criterion is '{text}'; it must be one of {', '.join(CRITERIA)}; or similarity, similarity+X, or "
            "heads=X,channels=Y"
        )
    return Choice(then or first, None, first == SIMILARITY)
