"""What people read of a run: tables, curves, the page, the model card."""
