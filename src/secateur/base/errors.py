"""The one exception that a person meets: one line that says what is wrong, where, and what to do."""


class SecateurError(Exception):
    """Bad input or an impossible request; the command line prints it and exits with code 2."""


class StoppedError(SecateurError):
    """Nothing is wrong with the request: the same command goes on once what is said has been mended."""
