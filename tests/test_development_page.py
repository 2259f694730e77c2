"""docs/development.md, the sections "Add a ...": done as written, in a copy, they work."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^ +```(?:python|text)\n(.*?)^ +```$", re.MULTILINE | re.DOTALL)


def steps(title: str) -> list[str]:
    """The code of a section, each block without the list's indent."""
    page = (ROOT / "docs/development.md").read_text()
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in BLOCK.findall(section)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "agent", tmp_path / "agent", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "tests").mkdir()
    for name in ("reference.py", "declarations.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    return tmp_path


def insert(path: Path, text: str, before: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1
    path.write_text(source.replace(before, text + before))


def lint(copy: Path) -> None:
    """The addition passes the linter of `make check`."""
    shutil.copy(ROOT / "pyproject.toml", copy)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "agent"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run(copy: Path, code: str, **variables: str) -> str:
    """What a program prints that imports the copy."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FAILOVER_")}
    path = f"import sys; sys.path.insert(0, {str(copy)!r}); import agent\n"
    path += f"assert agent.__file__.startswith({str(copy)!r})\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", path + textwrap.dedent(code)],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_setting_takes_one_field(copy: Path) -> None:
    (field,) = steps("Add a setting")
    insert(
        copy / "agent/schema/settings.py",
        textwrap.indent(field, " " * 4),
        '    log_level: LogLevel = "INFO"\n',
    )
    lint(copy)
    code = """
        from agent.cli.main import main
        from tests.reference import PROGRAMS, sample, settings_page
        from agent.cli.settings_reader import commands
        from agent.daemon.reload import RELOADABLE
        from agent.schema import exchange
        from agent.schema.read import Sources
        from agent.schema.settings import AgentSettings
        main(["run", "--help"], commands(lambda _: 0))
        assert "motto" in RELOADABLE
        sources = Sources(AgentSettings)
        settings = exchange.load(exchange.dump(sources.load()))
        print(settings.motto, sources.origin("motto"))
        print(settings_page(), sample(*PROGRAMS[0]))
        try:
            Sources(AgentSettings, {"motto": ""}).load()
        except Exception as error:
            print(error)
    """
    printed = run(copy, code, FAILOVER_AGENT_MOTTO="hello")
    assert "--motto TEXT" in printed
    assert "hello FAILOVER_AGENT_MOTTO\n" in printed
    assert "| `motto` | text | not set | For people. Not set: none. |" in printed
    assert '#motto = "two"\n' in printed
    assert "--motto ''" in printed


def test_a_check_kind_takes_its_file_and_one_line(copy: Path) -> None:
    file, line = steps("Add a check kind")
    (copy / "agent/drivers/checks/free_space.py").write_text(file)
    insert(copy / "agent/schema/kinds.py", textwrap.indent(line, " " * 8), "    },\n    most=64")
    lint(copy)
    code = """
        import asyncio
        from tests.reference import PROGRAMS, sample, settings_page
        from agent.drivers.checks.runner import Checks
        from agent.ops.clock import Clock
        from agent.schema import exchange
        from agent.schema.read import validate
        from agent.schema.kinds import CHECKS
        from agent.schema.settings import AgentSettings
        validate(AgentSettings, {"check": [CHECKS.load(kind).EXAMPLE for kind in CHECKS.kinds]})
        table = {"name": "a", "type": "free_space", "path": "/"}
        tables = [table | {"mib": 1}, table | {"name": "b", "mib": 1_000_000}]
        settings = validate(AgentSettings, {"check": tables})
        settings = exchange.load(exchange.dump(settings))
        async def main():
            checks = Checks(settings.check, Clock(), lambda health: None)
            checks.start()
            while not all(result.known for result in checks.health.results.values()):
                await asyncio.sleep(0.01)
            await checks.stop()
            print({name: result.up for name, result in checks.health.results.items()})
            print(checks.health.reason)
        asyncio.run(main())
        print(settings_page(), sample(*PROGRAMS[0]))
        try:
            validate(AgentSettings, {"check": [table | {"mib": 0}]})
        except Exception as error:
            print(error)
    """
    printed = run(copy, code)
    assert "{'a': True, 'b': False}" in printed
    assert re.search(r"b: / has \d+ MiB free, must be 1000000", printed)
    assert '`type = "free_space"`: Passes if a file system has room.' in printed
    assert "| `mib` | number, 1 to 1000000 | `100` |" in printed
    assert '#[[check]]\n#name = "space"\n#type = "free_space"\n#path = "/var"\n' in printed
    assert "mib = 0: must be greater than or equal to 1" in printed


def test_a_notification_event_takes_its_name_and_one_field(copy: Path) -> None:
    (field,) = steps("Add a notification event")
    insert(copy / "agent/drivers/hooks/spec.py", '"renamed", ', '"left")')
    insert(
        copy / "agent/schema/settings.py",
        textwrap.indent(field, " " * 4),
        "    hook_limit: Annotated[Duration, RELOADABLE]",
    )
    lint(copy)
    code = """
        import os, sys
        from agent.cli.hooks import command
        from agent.daemon.reload import RELOADABLE
        assert "hook_renamed" in RELOADABLE
        path = os.path.join(sys.argv[0] or ".", "hook")
        code = command.main(
            ["test", "renamed", "--hook-renamed", "/bin/true"], standalone_mode=False
        )
        print("code", code)
    """
    printed = run(copy, code)
    assert "renamed" in printed
    assert printed.endswith("code 0\n")


def test_a_route_takes_a_handler_and_one_row(copy: Path) -> None:
    handler, row = steps("Add a route")
    with (copy / "agent/coordinator/calls.py").open("a") as file:
        file.write(f"\n\n{handler}")
    table = copy / "agent/coordinator/route_table.py"
    insert(table, "    count_groups,\n", "    create_group,\n    create_session,")
    source = table.read_text()
    end = source.index(")\n\nMETRICS_ROUTES")
    table.write_text(source[:end] + textwrap.indent(row, " " * 4) + source[end:])
    lint(copy)
    code = """
        import asyncio, json
        import httpx2
        from agent.coordinator.api import Api
        from agent.coordinator.service import Coordinator
        from agent.coordinator.store.memory import MemoryStore
        from agent.core.group_state import Policy
        from agent.ops.clock import Clock
        async def main():
            coordinator = Coordinator(MemoryStore(), Clock().now, Policy(), max_groups=5)
            await coordinator.start()
            api = Api(coordinator, Clock().now)
            base = "http://test/api/v1/clientfailover"
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api)) as client:
                group = {"Id": "line-7", "FailoverTimeout": "00:00:10"}
                assert (await client.post(base + "/groups", json=group)).status_code == 201
                print((await client.get(base + "/groupcount")).text)
                document = (await client.get("http://test/openapi.json")).json()
                print([path for path in document["paths"] if path.endswith("/groupcount")])
            await coordinator.stop()
        asyncio.run(main())
    """
    printed = run(copy, code)
    assert '{"Version":"1"}' in printed
    assert "/api/v1/clientfailover/groupcount" in printed
