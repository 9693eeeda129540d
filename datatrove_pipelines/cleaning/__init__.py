"""Cleaning: named steps that leave out documents, or change them, and count what they did.

Which steps a source goes through is said by `clean` of its row. They run in the order of STEPS,
between the reader and the choice of held-out documents, and `pii`, whose replacements depend on the
documents before, after that choice. What is published clean is not cleaned again.
"""
