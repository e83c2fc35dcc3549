"""The faults that a caller of `trainer` can handle differently; each message says what to do."""

from __future__ import annotations


class TrainerError(Exception):
    """A fault the user can mend: the message names what, which value, and the fix."""


class BadGroupsError(TrainerError):
    """A groups file, or a file of items to score, cannot be read as one."""


class BadCheckpointError(TrainerError):
    """A folder is not a usable checkpoint, or not one of the kind asked for."""


class ResumeError(TrainerError):
    """An output folder holds a run that cannot be gone on with."""


class LayoutError(TrainerError):
    """A memory layout does not give the scores of separate sequences on this network."""


class DivergedError(TrainerError):
    """The loss stopped being a finite number; the last saved checkpoint is intact."""
