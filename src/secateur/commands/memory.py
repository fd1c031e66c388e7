"""How much memory a run may take: what a person allows, what it needs at the least, and the rest for activations."""

from secateur.base.errors import SecateurError
from secateur.base.memory import available_bytes, parse_memory, rss_bytes
from secateur.commands.costs import resident_bytes
from secateur.model.stream import BlockStream


def memory_limit(
    stream: BlockStream, allowed: str | None, *, input_steps: bool, separate_choice: bool
) -> tuple[int, int]:
    """Return the bytes that the process may take, and how many of them remain for activations.

    Args:
        allowed: `8GB`, or `50%` of what is free; half of it by default.
        input_steps: level 1 will be fitted along.
        separate_choice: whether units are chosen on other rows than the weights are fitted to.

    Raises:
        SecateurError: it is no amount, or less than the least.
    """
    most = parse_memory(allowed)
    least = rss_bytes() + resident_bytes(stream, input_steps=input_steps, separate_choice=separate_choice)
    if allowed is None:
        # What is there decides nothing before it is too little.
        most = max(most, min(least, available_bytes()))
    if most < least:
        said = f"memory is {most / 1e9:,.2f} GB" if allowed else f"{most / 1e9:,.2f} GB of memory are free"
        raise SecateurError(
            f"{said}, but the largest block of {stream.checkpoint.source} needs {least / 1e9:,.2f} GB; allow that, or "
            "take a machine that has it"
        )
    return most, most - least
