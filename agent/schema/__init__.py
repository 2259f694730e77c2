"""One declaration for each datum that crosses a boundary.

``api`` declares the shapes of the group API, once for both of its ends; ``codec`` decodes and encodes
them, and describes them and what is wrong with a body; ``values`` and ``scalars`` are what is inside
them: time-spans, date-times, enumerations. No pydantic in here: a running agent has none.
"""
