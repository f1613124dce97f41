"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """Bad input: one sentence that names the file or setting, what is wrong and what to do.

    The command line prints the sentence alone, without a traceback, and exits with status 2.
    """
