"""Recipes, the scale dial, and the stages with the code that runs them."""
