"""The one exception that is the user's to solve."""


class UserError(Exception):
    """Bad input: one sentence that says what is wrong, where (file, sample, key), and what to do.

    Command lines print it without a traceback and exit with code 2.
    """
