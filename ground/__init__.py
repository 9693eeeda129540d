"""What every engine stands on: one-line errors, files that are whole or absent, weights on disk."""
