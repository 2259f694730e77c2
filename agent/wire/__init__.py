"""What the group API looks like on the wire, for both of its ends.

``shapes`` is the coordinator's end (pydantic), ``answers`` the caller's (no pydantic), ``scalars`` what
both have inside: time-spans, date-times, enumerations.
"""
