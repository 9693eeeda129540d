"""What a user of the evaluation can get wrong."""


class EvalError(ValueError):
    """One line: the task, model or file, the value, and what to do."""
