"""From a form that was read and checked to its plain value in values.py."""

from dataclasses import fields
from typing import Any

from pydantic import BaseModel


def plain_of(form: BaseModel) -> Any:
    """The value of a form: an instance of the class that the form names as ``plain``."""
    value_class = form.plain  # type: ignore[attr-defined] # a ClassVar of each form
    return value_class(**{f.name: _plain(getattr(form, f.name)) for f in fields(value_class)})


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return plain_of(value)
    return tuple(map(_plain, value)) if type(value) is tuple else value
