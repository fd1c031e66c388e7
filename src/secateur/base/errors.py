"""The one exception that a person meets: one line that says what is wrong, where, and what to do."""


class SecateurError(Exception):
    """Bad input or an impossible request; the command line prints it and exits with code 2."""
