"""Every datum that crosses the program's boundary, declared once: settings, and the shapes of the group API.

``api`` declares the shapes, for the coordinator and for its callers; ``codec`` decodes, encodes and describes
them. ``settings`` and its neighbours declare the settings; only ``read`` needs pydantic.
"""
