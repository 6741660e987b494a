"""The one error type that means "the input is wrong, and here is what to do"."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one paragraph that names the offending thing, its value, and the next step. The command line prints
    it without a traceback and exits with status 2; every other exception is a defect and keeps its traceback.
    """
