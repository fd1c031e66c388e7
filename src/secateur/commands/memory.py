"""The limit on the memory of a run, and how much of it remains for activations and for weights that are used again."""

from secateur.base.errors import SecateurError
from secateur.base.memory import available_bytes, parse_memory, rss_bytes
from secateur.commands.costs import resident_bytes
from secateur.model.stream import BlockStream


def memory_limit(
    stream: BlockStream, allowed: str | None, *, tokens: int = 0, input_steps: bool, separate_choice: bool
) -> tuple[int, int]:
    """Return the bytes of memory that the process may use, and how many of them remain for activations.

    Args:
        stream: The open model.
        allowed: The value of `--memory`, such as `8GB` or `50%` of the free memory. By default half of the free memory,
            or all of it if the run needs more than half.
        tokens: Number of tokens of one fit.
        input_steps: Whether the up and gate projections are fitted too.
        separate_choice: Whether units are chosen on other rows than the weights are fitted to.

    Raises:
        SecateurError: `allowed` is not an amount of memory, or is less than the run needs.
    """
    limit = parse_memory(allowed)
    needed = rss_bytes() + resident_bytes(
        stream, tokens=tokens, input_steps=input_steps, separate_choice=separate_choice
    )
    if allowed is None:
        limit = max(limit, min(needed, available_bytes()))
    if limit < needed:
        have = f"memory is {allowed}" if allowed else f"{limit / 1e9:,.2f} GB of memory are free"
        raise SecateurError(
            f"{have}, but the largest block of {stream.checkpoint.source} needs {needed / 1e9:,.2f} GB; allow that "
            "much with --memory, or use a machine with more memory"
        )
    return limit, limit - needed
