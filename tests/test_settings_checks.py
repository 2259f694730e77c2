"""The [[check]] tables: what they mean, what is refused, and how a refusal says where."""

from pathlib import Path

import pytest

from agent.drivers.checks.command import ExecCheck
from agent.drivers.checks.http import HttpCheck
from agent.errors import ConfigError, ExitCode
from agent.schema.fields import settings_of
from agent.schema.kinds import CHECKS, PROGRESS, CheckSettings
from agent.schema.read import validate
from agent.schema.settings import AgentSettings
from agent.schema.toml import to_json, to_toml
from tests.declarations import load

MOST = CHECKS.most or 0

VALID: dict[str, str] = {
    "exec": 'command = ["/bin/true"]',
    "http": 'url = "http://127.0.0.1/"',
    "tcp": 'address = "127.0.0.1:1"',
    "file_age": 'path = "/tmp/x"\nmax_age = 60',
    "process": 'process = "init"',
    "prometheus": 'url = "http://127.0.0.1/"\nmetric = "m"\nop = ">"\nvalue = 1',
}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAILOVER_AGENT_CHECK", raising=False)


def table(kind: str, *lines: str, name: str = "a") -> str:
    return "\n".join(["[[check]]", f'name = "{name}"', f'type = "{kind}"', *lines, ""])


def read(tmp_path: Path, text: str) -> tuple[CheckSettings, ...]:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load(AgentSettings, path=path).check


def faults(tmp_path: Path, text: str) -> tuple[list[str], ExitCode]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    place = f"{tmp_path / 'agent.toml'}: "
    lines = str(caught.value).split("\n")
    assert all(line.startswith(place) for line in lines)
    return [line.removeprefix(place) for line in lines], caught.value.exit_code


@pytest.mark.parametrize("kind", CHECKS.kinds)
def test_each_type_needs_few_keys_and_has_the_documented_defaults(
    tmp_path: Path, kind: str
) -> None:
    (check,) = read(tmp_path, table(kind, VALID[kind]))
    assert isinstance(check, CHECKS.load(kind))
    assert (check.interval, check.limit, check.rise, check.fall) == (5, 2, 2, 3)
    assert (check.weight, check.required, check.scope) == (1, False, "always")


def test_the_default_limit_is_never_longer_than_the_interval(tmp_path: Path) -> None:
    (check,) = read(tmp_path, table("tcp", VALID["tcp"], "interval = 0.5"))
    assert check.limit == 0.5


def test_a_variable_and_a_flag_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[{"name": "a", "type": "exec", "command": ["/bin/true"]}]'
    (check,) = load(AgentSettings, {"check": text}).check
    assert isinstance(check, ExecCheck)
    monkeypatch.setenv("FAILOVER_AGENT_CHECK", text)
    assert load(AgentSettings).check == (check,)


@pytest.mark.parametrize(("text", "why"), [("[", "in JSON"), ("5", "tables"), ("x", "in JSON")])
def test_a_variable_that_is_not_tables_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.setenv("FAILOVER_AGENT_CHECK", text)
    with pytest.raises(ConfigError, match=f"^FAILOVER_AGENT_CHECK='.*{why}"):
        load(AgentSettings)


@pytest.mark.parametrize(
    ("status", "least", "most"), [("204", 204, 204), ('"204"', 204, 204), ('"200-299"', 200, 299)]
)
def test_a_status_is_one_or_a_range(tmp_path: Path, status: str, least: int, most: int) -> None:
    (check,) = read(tmp_path, table("http", VALID["http"], f"status = {status}"))
    assert isinstance(check, HttpCheck)
    assert check.status == (least, most)


@pytest.mark.parametrize(
    ("kind", "line", "why"),
    [
        ("exec", "limit = 6", "limit: must be at most interval, which is 5 s"),
        ("exec", "interval = 0.01", "interval = 0.01: must be greater than or equal to 0.05"),
        ("exec", "limit = true", "limit = True: a duration is seconds"),
        ("exec", "rise = 0", "rise = 0: must be greater"),
        ("exec", "fall = 1.5", "fall = 1.5: must be a valid integer"),
        ("exec", "weight = 0", "weight = 0: must be greater than 0"),
        ("exec", "weight = inf", "weight = inf: must be"),
        ("exec", 'required = "perhaps"', "required = 'perhaps': must be a valid boolean"),
        ("exec", 'scope = "often"', "scope = 'often': must be 'always' or 'primary'"),
        ("http", "status = 99", "status = 99: must be a status"),
        ("http", 'status = "399-200"', "must be a status (200) or a range"),
        ("http", "insecure_tls = true", "insecure_tls: is for an https:// url"),
        ("http", 'contains = ""', "contains = '': must be 1 to 1024 characters"),
        (
            "prometheus",
            'labels = {"a-b" = "x"}',
            "must be at most 32 labels, with names of letters",
        ),
        ("prometheus", "labels = {a = 1}", "labels = 1: must be a valid string"),
    ],
)
def test_a_wrong_key_is_one_line_with_table_name_key_and_value(
    tmp_path: Path, kind: str, line: str, why: str
) -> None:
    text = table("tcp", VALID["tcp"], name="first") + table(kind, VALID[kind], line, name="b")
    told, code = faults(tmp_path, text)
    assert code is ExitCode.CONFIG_VALUE
    assert len(told) == 1
    assert told[0].startswith("check 2 ('b'): ")
    assert why in told[0]


@pytest.mark.parametrize(
    ("kind", "lines", "why"),
    [
        ("exec", 'command = ["true"]', "absolute path"),
        ("exec", "command = []", "begins with a program"),
        ("exec", "", "command: is missing, and a check of type exec needs it"),
        ("http", 'url = "ftp://a"', "must be http(s)://HOST[:PORT][/PATH][?QUERY]"),
        ("tcp", 'address = "a:0"', "port from 1"),
        ("tcp", 'address = "a"', "HOST:PORT"),
        ("file_age", 'path = "x"\nmax_age = 1', "absolute"),
        ("file_age", "path = 1\nmax_age = 1", "must be a path"),
        ("process", "", "needs pid_file, process or both"),
        ("prometheus", 'url="http://a"\nmetric="a b"\nop=">"\nvalue=1', "name of a sample"),
        ("prometheus", 'url="http://a"\nmetric="a"\nop="=>"\nvalue=1', "must be '>'"),
        ("prometheus", 'url="http://a"\nmetric="a"\nop=">"\nvalue=nan', "finite"),
    ],
)
def test_what_a_type_cannot_be_done_with_is_refused(
    tmp_path: Path, kind: str, lines: str, why: str
) -> None:
    told, code = faults(tmp_path, table(kind, lines))
    assert code is ExitCode.CONFIG_VALUE
    assert len(told) == 1
    assert why in told[0]


def test_a_key_of_another_type_or_of_none_is_an_unknown_key(tmp_path: Path) -> None:
    told, code = faults(tmp_path, table("tcp", VALID["tcp"], 'url = "x"', "limmit = 9"))
    assert code is ExitCode.CONFIG_UNKNOWN_KEY
    assert told[0].startswith("check 1 ('a'): a check of type tcp has no key 'url': it has name, ")
    assert told[1].endswith("no key 'limmit': did you mean limit?")


def test_an_unknown_or_missing_type_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    told, _ = faults(tmp_path, table("telnet") + '[[check]]\nname = "b"\n')
    assert told[0] == f"check 1 ('a'): type = 'telnet': must be one of {', '.join(CHECKS.kinds)}"
    assert told[1] == f"check 2 ('b'): type: must be one of {', '.join(CHECKS.kinds)}"


def test_every_table_with_a_fault_is_reported_and_a_cause_only_once(tmp_path: Path) -> None:
    text = table("exec", name="A B") + table("tcp", VALID["tcp"]) + table("tcp", 'address="x"')
    told, _ = faults(tmp_path, text)
    assert [line.split(" ")[1] for line in told] == ["1", "1", "3"]
    assert "name = 'A B': must be 1 to 64 of the characters" in told[0]


def test_two_checks_of_one_name_are_refused(tmp_path: Path) -> None:
    told, _ = faults(tmp_path, table("tcp", VALID["tcp"]) * 2)
    assert told == ["check 2 ('a'): name: check 1 has that name already: choose another"]


def test_what_is_no_list_of_tables_is_refused(tmp_path: Path) -> None:
    assert "[[check]]" in faults(tmp_path, '[check]\nname = "a"\n')[0][0]
    assert faults(tmp_path, "check = [1]\n")[0] == ["check 1 = 1: must be a table, under [[check]]"]


def test_more_checks_than_the_most_are_refused(tmp_path: Path) -> None:
    tables = [table("tcp", VALID["tcp"], name=f"a{n}") for n in range(MOST + 1)]
    assert "at most 64 tables" in faults(tmp_path, "".join(tables))[0][0]
    assert len(read(tmp_path, "".join(tables[:-1]))) == MOST


def test_a_flood_of_faults_is_cut(tmp_path: Path) -> None:
    assert len(faults(tmp_path, table("exec", name="!") * MOST)[0]) == 20


def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path) -> None:
    told, _ = faults(tmp_path, table("http", 'url = "http://u:hunter2@a/"'))
    assert "must not have credentials" in told[0]
    assert "hunter2" not in told[0]


def test_the_examples_load_and_survive_being_written_as_toml_and_as_json(tmp_path: Path) -> None:
    examples = [CHECKS.load(kind).EXAMPLE for kind in CHECKS.kinds]
    checks = validate(AgentSettings, {"check": examples}).check
    assert read(tmp_path, f"check = {to_toml(checks)}\n") == checks
    assert validate(AgentSettings, {"check": to_json(checks)}).check == checks


def test_each_kind_has_a_sentence_for_the_reference() -> None:
    assert all((CHECKS.load(kind).__doc__ or "").startswith("Passes if ") for kind in CHECKS.kinds)


def test_a_kind_is_registered_under_the_type_that_it_declares() -> None:
    for tables in (CHECKS, PROGRESS):
        for kind in tables.kinds:
            (setting,) = (s for s in settings_of(tables.load(kind)) if s.name == "type")
            assert setting.default == kind
