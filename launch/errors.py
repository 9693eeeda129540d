"""Moved to ground/errors.py."""

from ground.errors import UserError, did_you_mean, disk_error

__all__ = ["UserError", "did_you_mean", "disk_error"]
