"""The recipe as typed, frozen values: the only reader of recipes/."""
