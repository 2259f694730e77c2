"""The units in systemd/: systemd finds no fault in them, and they are as closed as their work allows."""

import difflib
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from agent.cli.main import main
from agent.errors import ExitCode
from tests.credential_samples import fill

UNITS = Path(__file__).parents[1] / "systemd"
EXAMPLES = UNITS / "examples"
CONFIG = UNITS.parent / "config"
PAGE = UNITS.parent / "docs/high-availability.md"
PROGRAMS = ("/opt/failover-agent/bin/failover-agent", "/usr/local/bin/collector")
MOST = {"failover-coordinator": 1.3, "failover-agent": 3.7, "failover-agent@line-7": 3.7}
"""`systemd-analyze security`: 0 is locked up, 10 is bare. The coordinator's goal is 2.0."""
MOST_STRICT = 1.3
LIMIT_S = 60
AGAIN = {ExitCode.LISTEN, ExitCode.SESSION_IN_USE, ExitCode.STATE_FILE}
"""Faults that may be gone a second later, without anybody who mends them."""


def analyze(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """systemd-analyze with the units of ``folder``, before those of this machine."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("needs: systemd-analyze: apt-get install systemd")
    return subprocess.run(
        [tool, *words],
        cwd=folder,
        env={"SYSTEMD_UNIT_PATH": f"{folder}:", "PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every unit, with programs that this machine has."""
    for unit in [*UNITS.glob("*.service"), *EXAMPLES.glob("*.service")]:
        text = unit.read_text()
        for program in PROGRAMS:
            text = text.replace(program, "/bin/true")
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def drop_in(folder: Path, example: Path) -> str:
    """Add an example to the unit that its first line names; the unit's name."""
    unit = re.search(r"system/([\w@-]+\.service)\.d/[\w-]+\.conf", example.read_text())
    assert unit, f"{example.name} does not say where it goes"
    (folder / f"{unit[1]}.d").mkdir(exist_ok=True)
    shutil.copy(example, folder / f"{unit[1]}.d")
    return unit[1]


def test_systemd_finds_no_fault_in_the_units(folder: Path) -> None:
    names = [re.sub("@", "@line-7", path.name) for path in folder.glob("*.service")]
    assert len(names) == 4
    result = analyze(folder, "verify", *(f"./{name}" for name in names))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.conf")), ids=lambda path: path.stem)
def test_systemd_finds_no_fault_in_an_example(folder: Path, example: Path) -> None:
    unit = drop_in(folder, example)
    result = analyze(folder, "verify", f"./{unit}")
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_a_mistake_in_a_unit_is_found(folder: Path) -> None:
    unit = folder / "failover-agent.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchDogSec="))
    result = analyze(folder, "verify", f"./{unit.name}")
    assert "WatchDogSec" in result.stderr


@pytest.mark.parametrize(("unit", "most"), MOST.items())
def test_a_unit_is_as_closed_as_its_work_allows(folder: Path, unit: str, most: float) -> None:
    result = security(folder, f"{unit}.service", most)
    assert result.returncode == 0, result.stdout


def test_an_agent_without_privileged_hooks_can_be_far_more_closed(folder: Path) -> None:
    drop_in(folder, EXAMPLES / "agent-strict.conf")
    assert security(folder, "failover-agent.service", MOST_STRICT).returncode == 0


@pytest.mark.parametrize("unit", sorted(UNITS.rglob("*agent*")), ids=lambda unit: unit.name)
def test_an_agent_sees_the_processes_that_it_may_have_to_end(unit: Path) -> None:
    """It also reads the id of the boot that they are of, from /proc/sys."""
    assert not re.search(r"(?m)^(ProtectProc|ProcSubset)=", unit.read_text())


def test_an_open_unit_is_over_the_threshold(folder: Path) -> None:
    (folder / "open.service").write_text("[Service]\nExecStart=/bin/true\n")
    assert security(folder, "open.service", max(MOST.values())).returncode != 0


def security(folder: Path, unit: str, most: float) -> subprocess.CompletedProcess[str]:
    threshold = f"--threshold={round(most * 10)}"  # tenths, by systemd-analyze(1)
    return analyze(folder, "security", "--offline=true", threshold, "--no-pager", f"./{unit}")


def test_the_template_differs_only_where_the_instance_is_named() -> None:
    one, template = (
        (UNITS / f"failover-agent{at}.service").read_text().splitlines() for at in ("", "@")
    )
    changed = {line for line in difflib.ndiff(one, template) if line[0] == "+"}
    assert {line[2:].partition("=")[0] for line in changed if not line.startswith("+ #")} == {
        "Description",
        "ExecStart",
    }


@pytest.mark.parametrize("unit", ["failover-agent", "failover-coordinator"])
def test_a_fault_of_the_configuration_is_not_tried_again(unit: str) -> None:
    text = (UNITS / f"{unit}.service").read_text()
    found = re.search(r"(?m)^RestartPreventExitStatus=(.*)", text)
    assert found
    codes = {ExitCode(int(word)) for word in found[1].split()}
    assert not codes & AGAIN
    faults = {ExitCode.CONFIG_FILE, ExitCode.CONFIG_UNKNOWN_KEY, ExitCode.CONFIG_VALUE}
    if unit == "failover-agent":
        faults |= {code for code in ExitCode if ExitCode.TIMING <= code <= ExitCode.STATE_FILE}
        faults -= AGAIN
    assert codes >= faults


def test_a_stop_with_the_defaults_fits_into_the_unit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILOVER_AGENT_GROUP", "line-7")
    assert main(["check-config", "--json"]) == 0
    stop_s = json.loads(capsys.readouterr().out)["timing"]["longest_stop_s"]
    text = (UNITS / "failover-agent.service").read_text()
    assert 30 < stop_s < float(re.findall(r"(?m)^TimeoutStopSec=(.*)", text)[0])
    monkeypatch.setenv("FAILOVER_AGENT_FAILOVER_TIMEOUT", "600")
    assert main(["check-config"]) == 0  # R 390 + D 150, two requests of 10, 5 for left, 5 to close
    assert capsys.readouterr().out.splitlines()[-1].startswith("# a stop takes at most 600 s: ")


def test_a_coordinator_over_etcd_has_what_its_drop_ins_and_its_file_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each file that only root can read, the drop-ins give a copy by systemd (LoadCredential=)."""
    text = (CONFIG / "coordinator-etcd.toml").read_text()
    for name in ("etcd-ca.pem", "ca.pem", "etcd-password", "tls.crt", "tls.key", "users"):
        fill(tmp_path / name, name)
    given = set()
    for name in ("coordinator-credentials", "coordinator-etcd"):
        drop = (EXAMPLES / f"{name}.conf").read_text()
        for key, source in re.findall(r"(?m)^LoadCredential=([\w.-]+):(.*)", drop):
            assert f'"{source}"' in text, name
            given.add(str(tmp_path / key))
        for variable, value in re.findall(r"(?m)^Environment=(\w+)=(.*)", drop):
            monkeypatch.setenv(variable, value.replace("%d", str(tmp_path)))
    file = tmp_path / "coordinator.toml"
    file.write_text(text.replace('"/etc/failover-agent/', f'"{tmp_path}/'))
    words = ["check-config", "--coordinator", "--json", "--config", str(file)]
    assert main(words) == 0, capsys.readouterr().err
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["store"]["value"] == "etcd"
    from_root = {name for name, value in tomllib.loads(text).items() if "/secrets/" in str(value)}
    assert {settings[name]["value"] for name in from_root} == given
    for name in from_root:
        monkeypatch.delenv(f"FAILOVER_COORDINATOR_{name.upper()}")
    assert main(words) == ExitCode.CONFIG_VALUE  # each of the sample's files has to be there


def test_an_agent_with_failsafe_has_what_its_drop_in_and_the_page_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of the page, with the copy of the secret in place of the file of root."""
    page = (UNITS.parent / "docs/failsafe.md").read_text()
    (shown,) = re.findall(r"(?ms)^```toml\n(failsafe_listen = .*?)^```$", page)
    drop = (EXAMPLES / "agent-failsafe.conf").read_text()
    (key, source), *_ = re.findall(r"(?m)^LoadCredential=([\w.-]+):(.*)", drop)
    assert tomllib.loads(shown)["failsafe_secret_file"] == source
    (tmp_path / key).write_text(f"{'secret' * 4}\n")
    (tmp_path / key).chmod(0o400)
    for variable, value in re.findall(r"(?m)^Environment=(\w+)=(.*)", drop):
        monkeypatch.setenv(variable, value.replace("%d", str(tmp_path)))
    file = tmp_path / "agent.toml"
    file.write_text(f'group = "line-7"\n{shown}')
    assert main(["check-config", "--json", "--config", str(file)]) == 0, capsys.readouterr().err
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["failsafe_secret_file"]["value"] == str(tmp_path / key)
    assert settings["failsafe_listen"]["value"] == tomllib.loads(shown)["failsafe_listen"]


def test_the_page_shows_the_sample_of_a_coordinator_over_etcd() -> None:
    text = (CONFIG / "coordinator-etcd.toml").read_text()
    shown = re.search(r"(?ms)^   ```toml\n(   listen = .*?)^   ```$", PAGE.read_text())
    assert shown
    assert tomllib.loads(shown[1]) == tomllib.loads(text)


def test_the_users_that_units_name_are_made() -> None:
    made = set(re.findall(r"(?m)^u ([\w-]+)", (UNITS / "sysusers.conf").read_text()))
    named = {
        name
        for path in [*UNITS.glob("*.service"), *EXAMPLES.iterdir()]
        for name in re.findall(r"(?m)^User=(.*)", path.read_text())
    }
    assert named == made
