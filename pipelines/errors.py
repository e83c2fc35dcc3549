"""The faults that a caller of `pipelines` can handle differently; each message says what to do."""

from __future__ import annotations


class PolarError(Exception):
    """A fault the user can mend: the message names what, which value, and the fix."""


class ConfigError(PolarError):
    """A configuration or pool file says something that cannot be meant."""


class BadInputError(PolarError):
    """An input file as a whole cannot be read (single bad rows are quarantined instead)."""


class LakeError(PolarError):
    """The lake cannot be opened, read or published to; the last snapshot is intact."""


class PolicyUnavailableError(PolarError):
    """One policy cannot answer (weights missing, engine dead); other policies go on."""


class QueryError(PolarError):
    """A query is wrong, or is refused because it would write."""
