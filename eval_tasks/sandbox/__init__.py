"""A place where code that a model wrote can do no harm: started by outside.py, closed by inside.py."""
