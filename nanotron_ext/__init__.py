"""SmolLM3 as a nanotron plugin. Modules that subclass nanotron's classes are imported lazily."""
