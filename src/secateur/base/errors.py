"""Exceptions for the user: one line that says what is wrong, where, and what to do."""


class SecateurError(Exception):
    """Error for bad input or an impossible request. The command line prints it and exits with code 2."""


class StoppedError(SecateurError):
    """Error for a run that the same command resumes, once the cause in the message is removed (a full disk)."""
