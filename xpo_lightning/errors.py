"""The one error that a user's own input can cause."""


class InputError(ValueError):
    """Bad configuration, data, model or reward output.

    The message is one line for the person who wrote the input: it names the configuration key, the file and the row
    where they are known, and says what to do. The command line prints it without a traceback.
    """
