"""What every engine uses: one-line errors, files that are whole or absent, weights on disk."""
