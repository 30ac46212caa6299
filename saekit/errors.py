"""The one exception that is meant for a person's eyes."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the option or path, the value it had, and what to do. The command line
    prints it without a traceback and exits with code 2; a Python caller catches it as a `ValueError`.
    """
