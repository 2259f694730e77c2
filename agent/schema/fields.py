"""The declaration of a setting: a field of a frozen dataclass, with markers in its annotation.

``hook_limit: Annotated[float, DURATION, Range(0, 60), RELOADABLE] = 30.0`` and a string below it declare a
setting completely. The string explains the setting and its default, or, after ``Not set:``, what happens without a
value. Flag, environment variable, validation, the lines in the sample file and in docs/settings.md, and the reload
rule are derived by ``settings_of``.

Owns the markers. Imports no pydantic: a running agent uses the dataclasses and the reload rule.
"""

import ast
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


class Declared:
    """Base of the dataclasses whose fields are settings, or keys of a table."""

    __slots__ = ()

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Each broken relation between settings: the setting to name, and what would be right.

        A subclass that extends it calls ``Base.contradictions(self)``: ``super()`` without arguments
        does not work in a dataclass with slots.
        """
        yield from ()

    def needs(self, name: str, *others: str) -> Iterator[tuple[str, str]]:
        """A contradiction if a setting is set, but not all others that it needs."""
        missing = [other for other in others if getattr(self, other) is None]
        if missing and getattr(self, name) is not None:
            yield name, f"needs {' and '.join(missing)} too"

    def set_together(self, *names: str) -> Iterator[tuple[str, str]]:
        """A contradiction if some of these settings are set, but not all."""
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            yield from self.needs(given[0], *names)


class Table(Declared):
    """Base of the tables of one kind; ``TableKinds`` lists the kinds."""

    __slots__ = ()

    EXAMPLE: ClassVar[Mapping[str, Any]]
    """A table for the sample file."""

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        """The commands that the table runs, which are checked as a hook's are."""
        return ()


class Settings(Declared):
    """Base of the settings of one program."""

    __slots__ = ()

    env_prefix: ClassVar[str]
    """The prefix of the environment variables."""


@dataclass(frozen=True, slots=True)
class Format:
    """The format of a value.

    Attributes:
        metavar: the placeholder of the value in help texts.
        noun: the name of the format in docs/settings.md, before the range.
        unit: of the range, such as "s".
        parse: parses the given value, before its type and range are checked.
        check: checks, and perhaps changes, a value of the right type in its range.
        none: the text for None, if None does not mean "not set".
    """

    metavar: str
    noun: str
    unit: str = ""
    parse: Callable[[Any], Any] | None = None
    check: Callable[[Any], Any] | None = None
    none: str | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the greatest number.

    Attributes:
        above: whether the least number itself is too small.
        enforced: whether reading checks the range; if not, it is only documented.
    """

    least: float
    most: float
    above: bool = False
    enforced: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """The value in the sample file, for a setting without a default. That of a file follows from its name."""

    value: Any


@dataclass(frozen=True, slots=True)
class DefaultFrom:
    """The default is computed from the other values of the table, which are passed by name."""

    derive: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Reloadable:
    """A reload may change the setting without losing the role."""


RELOADABLE = Reloadable()


@dataclass(frozen=True, slots=True)
class TableKinds:
    """The setting is one TOML table, or several, of these kinds. Also the registry of the kinds.

    Attributes:
        key: the name of the setting, and of its tables.
        noun: the word for one table in an error.
        kinds: the class of each kind as ``module:Class``, by the value of the table's key ``type``; "" if
            there is only one kind. A class is imported when it is first used, so that an agent has only
            configured kinds in memory.
        most: the most tables; None for a single table.
    """

    key: str
    noun: str
    kinds: Mapping[str, str]
    most: int | None = None

    @property
    def header(self) -> str:
        """The line that begins a table in TOML."""
        return f"[{self.key}]" if self.most is None else f"[[{self.key}]]"

    def load(self, kind: str) -> type[Any]:
        """Import the class of a kind. Raises KeyError if there is no such kind."""
        module, _, name = self.kinds[kind].partition(":")
        loaded: type[Any] = getattr(importlib.import_module(module), name)
        return loaded


BOOLEAN = Format("", "true or false")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, or one key of a table, as its declaration describes it.

    Attributes:
        owner: the class that has it.
        name: its key in the file.
        annotation: the type of its value, without markers.
        default: MISSING if it has none, or one that is derived.
        markers: all markers, by their class.
    """

    owner: type[Any]
    name: str
    annotation: Any
    default: Any
    required: bool
    markers: Mapping[type[Any], Any]

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def value_type(self) -> Any:
        """The type of a value, without None."""
        if get_origin(self.annotation) in {Union, types.UnionType}:
            others = tuple(part for part in get_args(self.annotation) if part is not type(None))
            return Union[others]  # noqa: UP007 - of parts that are known now only
        return self.annotation

    @property
    def format(self) -> Format:
        """The format; a boolean and a choice need no marker."""
        if Format in self.markers:
            found: Format = self.markers[Format]
            return found
        if self.annotation is bool:
            return BOOLEAN
        if get_origin(self.value_type) is Literal:
            *words, last = map(str, get_args(self.value_type))
            return Format(
                "|".join([*words, last]), " or ".join(filter(None, [", ".join(words), last]))
            )
        tables: TableKinds = self.markers[TableKinds]
        if tables.most is None:
            return Format("JSON", f"table {tables.header}")
        return Format("JSON", f"tables {tables.header}, at most {tables.most}")

    @property
    def doc(self) -> str:
        """The text that explains the setting and its default."""
        for owner in self.owner.__mro__:
            if self.name in (docs := _docs_of(owner)):
                return docs[self.name]
        return str(self.markers.get(str, ""))

    @property
    def has_default(self) -> bool:
        """Whether the setting has a value if it is not set."""
        return self.default is not MISSING and not is_unset(self.default)

    @property
    def tables(self) -> TableKinds | None:
        """The kinds of table, if the setting consists of tables; else None."""
        return self.markers.get(TableKinds)


def is_unset(value: object) -> bool:
    """Whether a value means "not set"."""
    return value is None or value in ("", ())


@cache
def _settings_of(declared: Any) -> tuple[Setting, ...]:
    """Every setting of a class, in order."""
    hints = get_type_hints(declared, include_extras=True)
    bare = get_type_hints(declared)
    found = []
    for item in fields(declared):
        markers = {type(part): part for part in parts_of(hints[item.name])}
        given = (item.default, item.default_factory)
        required = given == (MISSING, MISSING) and DefaultFrom not in markers
        found.append(Setting(declared, item.name, bare[item.name], item.default, required, markers))
    return tuple(found)


settings_of: Callable[[Any], tuple[Setting, ...]] = (
    _settings_of  # mypy takes classes for unhashable, and refuses them as keys of the cache
)


@cache
def _docs_of(declared: Any) -> Mapping[str, str]:
    """The strings below the fields of a class, from its source: a running agent keeps none in memory."""
    if not issubclass(declared, Declared):
        return {}
    node: Any = ast.parse(inspect.getsource(declared)).body[0]
    return {
        ast.unparse(item.target): " ".join(str(ast.literal_eval(below.value)).split())
        for item, below in pairwise(node.body)
        if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def parts_of(annotation: Any) -> Iterator[Any]:
    """The types and the markers in an annotation, a list before its members, and a type before its markers."""
    origin = get_origin(annotation)
    if origin is list:
        yield list
    if origin in {Annotated, Union, types.UnionType, list}:
        for part in get_args(annotation):
            yield from parts_of(part)
    else:
        yield annotation


def reloadable(declared: type[Any]) -> frozenset[str]:
    """The settings that a reload may change; a change of another one is refused by name."""
    return frozenset(item.name for item in settings_of(declared) if Reloadable in item.markers)
