"""The engine's one-line errors."""


class PosttrainError(ValueError):
    """A row, setting or checkpoint that cannot be trained on: where, what, and the remedy."""
