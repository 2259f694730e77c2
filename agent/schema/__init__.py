"""Declare every datum that enters or leaves the program once: settings, and the shapes of the group API.

``api`` declares the shapes for the coordinator and its clients; ``codec`` decodes, encodes and describes them.
``settings`` and the modules that it imports declare the settings; only ``read`` needs pydantic.
"""
