"""Faults of earlier versions that can be planted into the world's model of the daemon.

A simulation that cannot fail proves nothing: ``test_planted.py`` plants each and has it found. Faults of the
pure core are planted there, as subclasses.
"""

from enum import StrEnum


class Defect(StrEnum):
    """A defect that makes two members active, or blocks the role."""

    WAITS_FOR_THE_KILLED_GUARD = "waits-for-the-killed-guard"
    """The loop waits for the exit of a guard that it has killed."""
    RUN_ENDS_WITH_ITS_LEADER = "run-ends-with-its-leader"
    """A hook ends with its first process, and its other processes are not killed."""
    KILLS_ONLY_GROUPS = "kills-only-groups"
    """Processes that have left the process group of their hook are not found."""
    CALLS_THE_GUARD_OFF = "calls-the-guard-off"
    """An exception in the loop disarms the guard before the process exits."""
    LOSES_TASKS = "loses-tasks"
    """A background task fails unnoticed."""
    STARTS_BEFORE_IT_DEMOTES = "starts-before-it-demotes"
    """A step that can fail comes before the first demotion."""
    READS_BY_POSITION = "reads-by-position"
    """A reload with another version on disk runs the promotion hook as demotion hook."""
    RELEASES_UNDONE = "releases-undone"
    """The guard releases the role although its demotion has failed, or is not done yet."""
    RELEASES_AS_ANYBODY = "releases-as-anybody"
    """The release of a guard or of the next process has neither epoch nor instance of the tenure."""
