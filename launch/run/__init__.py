"""Run folders: identity, lock, child processes, what a cluster is asked for."""
