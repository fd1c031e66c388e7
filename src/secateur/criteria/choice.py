"""Which criterion chooses the heads and which the channels, as a person writes it."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.base.errors import SecateurError
from secateur.base.plugins import preselections

EXPERTS = ("reroute", "reap", "frequency", "random")
"""Orders of experts (`secateur.criteria.experts`), the default first."""
IDENTITY = "second-moment-identity"
"""What second-moment is with Σ = I, which a person writes as an option of its own."""
_NAMES = re.compile(r'^@\w*criterion\("([\w-]+)"', re.MULTILINE)
# Read off the sources: a misspelt name is found before torch is loaded.
_SOURCES = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
_FOUND = [name for text in _SOURCES for name in _NAMES.findall(text) if name != IDENTITY]
CRITERIA: tuple[str, ...] = tuple(sorted(_FOUND, key=lambda name: name != "surgeon"))


@dataclass(frozen=True)
class Choice:
    """One criterion for each kind of unit."""

    heads: str
    """Orders the heads."""
    channels: str | None
    """Orders the channels; None where they stay."""
    preselection: str | None = None
    """Preselection of a plug-in, whose heads leave before all others."""
    experts: str = EXPERTS[0]
    """Orders the experts."""
    text: str = field(default="", compare=False)
    """As it was written."""

    @property
    def preselection_only(self) -> bool:
        """Whether the preselection decides how many heads go, and nothing else goes."""
        return self.heads == self.preselection

    def of(self, kind: str) -> str:
        """The criterion for one kind."""
        if kind == "experts":
            return self.experts
        return self.heads if kind == "heads" or self.channels is None else self.channels

    def uses(self, criterion: str) -> bool:
        """Whether a criterion is one of them."""
        return criterion in (self.of("heads"), self.of("channels"), self.experts)


def parse_choice(text: str) -> Choice:
    """Read a criterion: `X` for all units, `heads=X,channels=Y`, and with a preselection P for heads `P` or `P+X`.

    An order of experts stands alone or as `experts=Z` behind a pair.

    Raises:
        SecateurError: it is none of these.
    """
    pair, *experts = re.split(r"(?:^|,)\s*experts=", text)
    if text in EXPERTS and text not in CRITERIA:
        return Choice("surgeon", "surgeon", None, text, text)
    if experts:
        if len(experts) > 1 or experts[0] not in EXPERTS:
            raise SecateurError(f"criterion is '{text}'; that of experts must be one of {', '.join(EXPERTS)}")
        return replace(parse_choice(pair or "surgeon"), experts=experts[0], text=text)
    if "=" not in text:
        heads = _heads(text, text)
        # Behind a preselection, X is for channels too.
        rest = None if heads.preselection_only else heads.heads
        return Choice(heads.heads, rest, heads.preselection, text if text in EXPERTS else EXPERTS[0], text)
    parts = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(parts) != {"heads", "channels"} or text.count(",") != 1:
        raise SecateurError(f"criterion is '{text}'; a pair is written heads=X,channels=Y")
    if parts["channels"] not in (*CRITERIA, IDENTITY):
        raise SecateurError(
            f"criterion is '{text}'; that of channels must be one of {', '.join(CRITERIA)}"
            + "".join(f": {name} is between heads" for name in preselections() if name in parts["channels"])
        )
    heads = _heads(parts["heads"], text)
    if heads.preselection_only:
        raise SecateurError(
            f"criterion is '{text}'; {heads.preselection} alone leaves all channels: write {heads.preselection}+X"
        )
    return replace(heads, channels=parts["channels"], text=text)


def _heads(name: str, text: str) -> Choice:
    """The part about heads."""
    first, plus, then = name.partition("+")
    scores, ahead = (*CRITERIA, IDENTITY), preselections()
    known = first in (*scores, *ahead) if not plus else first in ahead and then in scores
    if not known:
        others = "".join(f"{name}, {name}+X, " for name in ahead)
        raise SecateurError(
            f"criterion is '{text}'; it must be one of {', '.join(CRITERIA)}; or {others}or heads=X,channels=Y; of "
            f"experts {', '.join(EXPERTS)}"
        )
    return Choice(then or first, None, first if first in ahead else None)
