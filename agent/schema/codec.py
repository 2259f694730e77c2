"""Encode and decode shapes as JSON, explain a wrong body in one sentence, and build the shapes' JSON Schema.

Owns no shape (api.py) and no type inside one (values.py). Decoders and encoders are built once.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from operator import attrgetter
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from agent.schema import access, api, failsafe_api
from agent.schema.fields import parts_of
from agent.schema.scalars import not_json, shown
from agent.schema.values import Id, Shape, encode_inside

S = TypeVar("S", bound=Shape)

SHAPES: tuple[type[Shape], ...] = tuple(
    one
    for module in (api, failsafe_api, access)
    for one in vars(module).values()
    if isinstance(one, type) and issubclass(one, Shape) and one.__module__ == module.__name__
)
REQUESTS = tuple(shape for shape in SHAPES if shape.__name__.endswith("Request"))

REFERENCE = "#/components/schemas/{name}"

MAX_LEVELS = 200
"""The deepest nesting of lists and objects in a body, so that no parser runs out of stack."""

MAX_DIGITS = 4000
"""The most digits of an integer in a body: Python refuses to convert more than 4300."""

_Path = list[str | int]

_WRITERS = {
    names: msgspec.json.Encoder(enc_hook=partial(encode_inside, names=names))
    for names in (False, True)
}


class BodyError(ValueError):
    """A body is wrong: one sentence on the first fault, without a full stop."""


def encode(value: Struct | Sequence[Struct], *, enum_names: bool = False) -> bytes:
    """Encode a body. Null properties are left out; roles are numbers, or names with ``enum_names``."""
    return _WRITERS[enum_names].encode(value)


def decode(shape: type[S], body: bytes, whole: str = "the body") -> S:
    """Decode a body as a shape. ``whole`` is the name of the whole body in an error.

    Raises:
        BodyError: the body does not have this shape, or is not JSON.
    """
    value: S = _decode(shape, body, whole)
    return value


def decode_many(shape: type[S], body: bytes, whole: str = "the body") -> list[S]:
    """Decode a body that is a list of shapes, as ``decode`` does."""
    values: list[S] = _decode(list[shape], body, whole)  # type: ignore[valid-type] # at runtime
    return values


def has_none_of(value: Shape, body: bytes) -> bool:
    """Whether a decoded body has properties, but none of its shape's, so that it must be something else."""
    if any(getattr(value, name) is not None for name in value.__struct_fields__):
        return False
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])  # the values may be anything
    return bool(given) and not given.keys() & set(value.__struct_encode_fields__)


def _decode(kind: Any, body: bytes, whole: str) -> Any:
    try:
        if not body.isascii():
            body.decode()  # msgspec does not check the UTF-8 of properties that it ignores
        if body.count(b"{") + body.count(b"[") > MAX_LEVELS and _levels(body) > MAX_LEVELS:
            raise BodyError(
                f"{whole} nests more than {MAX_LEVELS} levels deep: it must be nested less"
            )
        return _reader(kind).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = _explain(error, kind, body, whole)  # may contain half a surrogate pair of the body
        raise BodyError(text.encode(errors="backslashreplace").decode()) from None


@cache
def _reader(kind: Any) -> msgspec.json.Decoder[Any]:
    def read(inside: Any, given: Any) -> Any:
        return inside.read(given)

    return msgspec.json.Decoder(kind, dec_hook=read)


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STEPS = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}
_OTHERS = bytes(set(range(256)) - _STEPS.keys())


def _levels(body: bytes) -> int:
    """How deep lists and objects nest, also in a text that is not valid JSON."""
    brackets = _STRING.sub(b"", body).translate(None, delete=_OTHERS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


_WHERE = re.compile(r" - at `\$(.*)`$")
_STEP = re.compile(r"\.(\w+)|\[([0-9]+)\]")
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def _explain(error: Exception, kind: Any, body: bytes, whole: str) -> str:
    """Why a body is not JSON, or which property is wrong. The standard library's parser finds the place."""
    try:
        given = json.loads(body.decode(), parse_int=lambda digits: int(digits[:MAX_DIGITS]))
    except UnicodeDecodeError:
        return not_json(body, whole, "not UTF-8")
    except ValueError as fault:
        return not_json(body, whole, str(fault))
    if isinstance(error, msgspec.ValidationError):
        return _explain_property(error, kind, given, whole)
    for path, value in _walk(given):
        if isinstance(value, float) and not math.isfinite(value):
            right = _right(kind, path, "a finite number")
            return f"{_format(path, whole)} is {shown(value)}: it must be {right}"
    return not_json(body, whole, "half a surrogate pair")


def _explain_property(error: Exception, kind: Any, given: Any, whole: str) -> str:
    """Which property is wrong, what was given, and what would be right."""
    text, cause = str(error), error.__cause__
    found = _WHERE.search(text)
    place, inside, _ = (found[1] if found else "").partition("[...]")
    path: _Path = [name or int(index) for name, index in _STEP.findall(place)]
    if missing := _MISSING.match(text):
        path.append(missing[1])
    where, right = _format(path, whole), _right(kind, path, "a JSON list")
    if missing:
        return f"{where} is missing: it must be {right}"
    if isinstance(cause, ValueError):
        return f"{where}: {cause}"
    if "out of range" in text:
        if inside:
            return f"{where}: it holds a number that is out of range: each must be finite"
        return f"{where} is out of range: it must be {right}"
    if text.startswith("Expected `object"):
        right = "a JSON object"
    try:
        for step in path:
            given = given[step]
    except (LookupError, TypeError):  # the property occurs twice, and the last one is right
        return f"{where} is wrong: it must be {right}"
    return f"{where} is {shown(given)}: it must be {right}"


def _walk(value: Any) -> Iterator[tuple[_Path, Any]]:
    """Every value inside a value, with its path."""
    left: list[tuple[_Path, Any]] = [([], value)]
    while left:
        path, one = left.pop()
        yield path, one
        steps = one if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        left += [([*path, step], one[step]) for step in steps]


def _format(path: _Path, whole: str) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).lstrip(".") or whole


def _right(kind: Any, path: _Path, otherwise: str) -> str:
    """The description of the last property of the path, which begins in a shape of this type."""
    right = otherwise
    for name in (step for step in path if isinstance(step, str)):
        fields = [field for shape in _shapes_in(kind) for field in msgspec.structs.fields(shape)]
        kind = next((field.type for field in fields if field.encode_name == name), None)
        if kind is None:
            return otherwise
        right = _in_words(kind)
    return right


_WORDS = {str: "a string", bool: "a boolean", float: "a number", list: "a list"}


def _in_words(annotated: Any) -> str:
    """The accepted values of a property: type, bounds, and the annotation's string, after a colon or its comma."""
    words = bounds = text = ""
    for part in parts_of(annotated):
        if isinstance(part, str):
            text = part if part.startswith(",") else f": {part}"
        elif isinstance(part, Meta) and part.le is not None:
            bounds = f" from {part.ge} to {part.le}"
        elif isinstance(part, Meta):
            least = f"{part.min_length} to" if part.min_length else "at most"
            unit = "entries" if words == _WORDS[list] else "characters"
            bounds = f" of {least} {part.max_length} {unit}"
        elif get_origin(part) is Literal:
            words = f"one of {', '.join(get_args(part))}"
        elif not words:
            words = getattr(part, "words", None) or _WORDS[part]
    return words + bounds + text


def _shapes_in(kind: Any) -> list[type[Shape]]:
    """The shapes in a type, without those inside them."""
    return [part for part in parts_of(kind) if isinstance(part, type) and issubclass(part, Shape)]


def component_schemas() -> dict[str, Any]:
    """OpenAPI 3.1 ``components.schemas`` of all shapes, by class name."""
    _, schemas = msgspec.json.schema_components(
        SHAPES, schema_hook=attrgetter("schema"), ref_template=REFERENCE
    )
    asked = set(REQUESTS)
    for shape in reversed(SHAPES):  # a shape is declared after those inside it
        properties = schemas[shape.__name__]["properties"]
        for field in msgspec.structs.fields(shape):
            key, answered = field.encode_name, shape not in asked
            properties[key] = _tidied(field.type, properties[key], answered=answered)
            if not answered:
                asked.update(_shapes_in(field.type))
    return schemas


def id_schema() -> dict[str, Any]:
    """The JSON Schema of an id in a path."""
    return _tidied(Id, msgspec.json.schema(Id), answered=False)


def _tidied(kind: Any, declared: Any, *, answered: bool) -> dict[str, Any]:
    """A property's schema with JSON Schema's ``$``, without ``default: null``, and without null in an answer."""
    words = _in_words(kind)
    schema = {key: value for key, value in declared.items() if key != "default"}
    choices = schema.pop("anyOf", [])
    if answered:
        choices = [one for one in choices if one != {"type": "null"}]
    if len(choices) > 1:
        schema["anyOf"] = choices
    elif choices:
        schema = {**choices[0], **schema}
    for one in (schema, *choices):
        if "pattern" in one:
            one["pattern"] = one["pattern"].replace(r"\Z", "$")
    return {**schema, "description": f"{words[0].upper()}{words[1:]}."}
