"""Recipes, the scale dial and the stage runner."""
