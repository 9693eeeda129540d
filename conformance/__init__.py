"""A kit that says whether a runtime runs SmolLM3 as transformers does."""
