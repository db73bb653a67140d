"""The errors a user can cause, each one readable line; picklable, so that they cross Ray unharmed."""

from __future__ import annotations


class SlipstreamError(Exception):
    """Base of every error that is printed as one line; `exit_code` ends the process."""

    exit_code = 1


class ConfigError(SlipstreamError):
    """A key, the value given, what is allowed, and the nearest valid key."""

    exit_code = 2


class DataError(SlipstreamError):
    """A data set, tokenizer or reward function that cannot be used; names the file, row or function."""

    exit_code = 2


class ClusterError(SlipstreamError):
    """Ray cannot be started or reached, or an actor is gone; names the address or the actor."""


class StalledError(SlipstreamError):
    """A deadline passed; names who waited for whom and for how long."""


class CheckpointError(SlipstreamError):
    """A checkpoint cannot be written or read; names the path and the reason."""
