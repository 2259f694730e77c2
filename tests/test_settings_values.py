"""The plain values are what the forms say, and an agent that runs has no pydantic."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from agent.settings import checks, exchange, mqtt, progress, values
from agent.settings.models import AgentForm

FORMS: list[type[BaseModel]] = [
    AgentForm,
    *checks.TYPES.values(),
    *progress.TYPES.values(),
    mqtt.MqttForm,
]


def bare(hint: Any) -> Any:
    """A type without what is said about it, and with values in the place of their forms."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint.plain  # type: ignore[attr-defined] # a ClassVar of each form
    arguments = get_args(hint)
    if not arguments or not any(isinstance(part, type) or get_args(part) for part in arguments):
        return hint
    parts = tuple(bare(part) for part in arguments)
    origin = get_origin(hint)
    if origin in {dict, Mapping, get_origin(Mapping[str, str])}:
        return ("mapping", *parts)
    if origin is tuple:
        return ("tuple", *parts)
    return Union[parts]  # noqa: UP007 - of parts that are known now only


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_value_has_the_keys_of_its_form_with_their_types(form: type[BaseModel]) -> None:
    value = form.plain  # type: ignore[attr-defined] # as above
    hints = get_type_hints(value)
    assert {f.name for f in fields(value)} == set(form.model_fields)
    for key, info in form.model_fields.items():
        assert bare(info.annotation) == bare(hints[key]), key


def test_every_value_has_a_form() -> None:
    made = {form.plain for form in FORMS}  # type: ignore[attr-defined] # as above
    bases = {values.AnyCheck, values.AnySource, values.PolledSource, values.Broker}
    there = {v for v in vars(values).values() if hasattr(v, "__dataclass_fields__")}
    there = {v for v in there if v.__module__ == values.__name__}
    assert there - bases == made


def everything(tmp_path: Path) -> Iterator[AgentForm]:
    """Forms with every kind of table."""
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o600)

    def with_files(table: Mapping[str, Any]) -> dict[str, Any]:
        return {k: str(secret) if k.endswith("_file") else v for k, v in table.items()}

    for example in progress.EXAMPLES:
        yield AgentForm.model_validate(
            {
                "group": "g",
                "check": list(checks.EXAMPLES),
                "progress": with_files(example) if example["type"] == "mqtt" else example,
                "mqtt": with_files(mqtt.EXAMPLE),
            }
        )


def test_a_value_has_what_its_form_was_told_and_can_be_handed_over(tmp_path: Path) -> None:
    for form in everything(tmp_path):
        told = form.value()
        assert exchange.load(exchange.dump(told)) == told
        assert (told.group, told.probe_listen) == (form.group, form.probe_listen)
        for given, value in zip(form.check, told.check, strict=True):
            for key in type(given).model_fields:
                assert getattr(value, key) == getattr(given, key)
        assert form.progress is not None
        for key in type(form.progress).model_fields:
            assert getattr(told.progress, key) == getattr(form.progress, key)
        assert form.mqtt is not None
        for key in type(form.mqtt).model_fields:
            assert getattr(told.mqtt, key) == getattr(form.mqtt, key)


@pytest.mark.parametrize(
    "module", ["agent.cli.run", "agent.cli.exec", "agent.daemon.life", "agent.guard.main"]
)
def test_what_an_agent_keeps_in_memory_has_no_pydantic_and_no_rich(module: str) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    unwanted = ("pydantic", "pydantic_core", "pydantic_settings", "rich", "aiomqtt", "apsw")
    assert module in loaded
    assert not [name for name in loaded if name.split(".")[0] in unwanted]
