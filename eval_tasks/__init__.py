"""Evaluation: pure scorers, without nanotron."""
