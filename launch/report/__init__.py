"""What people read about a run: tables, curves, the page, the model card."""
