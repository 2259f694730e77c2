"""Faults of earlier versions that can be planted into the world's model of the daemon.

A simulation that cannot fail proves nothing: ``test_planted.py`` plants each and has it found. Faults of the
pure core are planted there, as subclasses.
"""

from enum import StrEnum


class Defect(StrEnum):
    """A behaviour that makes two members active, or keeps the role from everybody."""

    WAITS_FOR_THE_KILLED_GUARD = "waits-for-the-killed-guard"
    """The loop waits until a guard that it has killed is gone."""
    RUN_ENDS_WITH_ITS_LEADER = "run-ends-with-its-leader"
    """A hook has ended when its first process has, and what is left of it is not killed."""
    KILLS_ONLY_GROUPS = "kills-only-groups"
    """What has left the process group of its hook is not found."""
    CALLS_THE_GUARD_OFF = "calls-the-guard-off"
    """An exception in the loop calls the guard off before the process ends."""
    LOSES_TASKS = "loses-tasks"
    """A background task dies and nobody notices."""
    STARTS_BEFORE_IT_DEMOTES = "starts-before-it-demotes"
    """Something that can fail comes before the first demotion."""
    READS_BY_POSITION = "reads-by-position"
    """A reload with another version on disk takes the promotion hook for the demotion hook."""
    RELEASES_UNDONE = "releases-undone"
    """The guard gives the role back though its demotion has failed, or is not done yet."""
    RELEASES_AS_ANYBODY = "releases-as-anybody"
    """The release of a guard or of the next life carries neither epoch nor instance of the tenure."""
