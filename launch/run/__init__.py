"""Run folders: identity, lock, children, what a cluster is asked for."""
