"""Option `--criterion`: one criterion for heads, one for channels, one for experts.

The forms of the option are

    X                        criterion X for heads and channels
    heads=X,channels=Y       criterion X for heads, Y for channels
    Z                        criterion Z for experts, the default for heads and channels
    ...,experts=Z            one of the first two forms, with criterion Z for experts

`random` is a criterion of all three kinds; alone, it applies to all of them.

For heads, X may also be `similarity`, which removes heads that are similar to another head, or `similarity+X`, which
removes these heads first and then further ones by criterion X.
"""

from dataclasses import dataclass, field, replace

from secateur.base import names
from secateur.base.errors import SecateurError

EXPERTS = ("reroute", "reap", "frequency", "random")
"""Expert criteria (`secateur.criteria.experts`), the default first."""
DEFAULT = next(iter(names.CRITERIA))
"""Default criterion of heads and of channels."""
IDENTITY = "second-moment-identity"
"""Criterion second-moment with the identity as covariance; `--sigma` selects it, not its name."""
SIMILARITY = "similarity"
"""Criterion that compares heads in pairs, and gives no unit a score; see `secateur.plan.similar_heads`."""
CRITERIA: tuple[str, ...] = tuple(name for name in names.CRITERIA if name != IDENTITY)
"""Criteria of heads and of channels, the default first."""


@dataclass(frozen=True)
class Choice:
    """Names of the criteria, one for each kind of unit."""

    heads: str
    """Criterion of the heads; after `similarity`, if that is not alone."""
    channels: str | None
    """Criterion of the channels; None if no channel is removed."""
    compares_heads: bool = False
    """Whether heads that are similar to another head are removed before all others."""
    experts: str = EXPERTS[0]
    """Criterion of the experts."""
    text: str = field(default="", compare=False)
    """The option as the user wrote it."""

    @property
    def only_compares_heads(self) -> bool:
        """Whether similar heads are removed, and nothing else."""
        return self.heads == SIMILARITY

    def of(self, kind: str) -> str:
        """Return the criterion for one kind of unit."""
        if kind == "experts":
            return self.experts
        return self.heads if kind == "heads" or self.channels is None else self.channels

    def uses(self, criterion: str) -> bool:
        """Return whether a criterion is among the chosen ones."""
        return criterion in (self.of("heads"), self.of("channels"), self.experts)


def parse_choice(text: str) -> Choice:
    """Read the option; the docstring of this file gives its forms.

    Raises:
        SecateurError: The text has none of these forms, or a name is not known.
    """
    parts = [part.strip() for part in text.split(",")]
    experts = [part.removeprefix("experts=") for part in parts if part.startswith("experts=")]
    others = text
    if experts:
        if len(experts) > 1 or experts[0] not in EXPERTS:
            raise SecateurError(f"criterion is '{text}'; the criterion of experts must be one of {', '.join(EXPERTS)}")
        others = ",".join(part for part in parts if not part.startswith("experts=")) or DEFAULT
    elif text in EXPERTS:
        experts = [text]
    if others in EXPERTS and others not in CRITERIA:
        if experts != [text]:
            raise SecateurError(f"criterion is '{text}'; {others} and {experts[0]} are both for experts; name one")
        others = DEFAULT
    found = _parse_pair(others) if "=" in others else _parse_heads(others, others)
    channels = found.channels if "=" in others or found.only_compares_heads else found.heads
    return replace(found, channels=channels, experts=(experts or EXPERTS)[0], text=text)


def _parse_pair(text: str) -> Choice:
    """Read `heads=X,channels=Y`."""
    parts = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(parts) != {"heads", "channels"} or text.count(",") != 1:
        raise SecateurError(f"criterion is '{text}'; write a criterion for each as heads=X,channels=Y")
    if parts["channels"] not in (*CRITERIA, IDENTITY):
        raise SecateurError(
            f"criterion is '{text}'; the criterion of channels must be one of {', '.join(CRITERIA)}"
            + (f"; {SIMILARITY} compares heads only" if SIMILARITY in parts["channels"] else "")
        )
    heads = _parse_heads(parts["heads"], text)
    if heads.only_compares_heads:
        raise SecateurError(
            f"criterion is '{text}'; {SIMILARITY} alone removes no channels: write heads={SIMILARITY}+X,channels=Y"
        )
    return replace(heads, channels=parts["channels"])


def _parse_heads(name: str, text: str) -> Choice:
    """Read the criterion of the heads; `text` is the whole option, for the error message."""
    first, plus, then = name.partition("+")
    criteria = (*CRITERIA, IDENTITY)
    known = first in (*criteria, SIMILARITY) if not plus else first == SIMILARITY and then in criteria
    if not known:
        raise SecateurError(
            f"criterion is '{text}'; it must be one of {', '.join(CRITERIA)}; or {SIMILARITY}, {SIMILARITY}+X, or "
            f"heads=X,channels=Y; for experts one of {', '.join(EXPERTS)}"
        )
    return Choice(then or first, None, first == SIMILARITY)
