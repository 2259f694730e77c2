"""The samples with failsafe, in containers of the image: what compose and a kubelet would start, on hosts of a LAN.

Commands, variables, mounts, users and modes are those of the files in config/. A service or pod has a network
namespace of its own, in which the others have their names, and a pod the rules of its NetworkPolicy.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent.coordinator.auth import hash_password
from tests.test_container_files import COMPOSE, COMPOSE_FAILSAFE, INSTALLED, environment_of
from tests.test_network_policies import Place, pod, reaches

from .containers import BUILD_S, Container, Engine
from .lan import Lan, LanHost, a_lan, run
from .stage import ask, until

USER = 10001
STRANGER = Place(labels={"app.kubernetes.io/name": "other"})
PODS = ("failover-coordinator-0", "collector-0", "collector-1")
PROBE, FAILSAFE, HTTP, API = 9170, 5480, 8080, 5470
PORTS = (PROBE, FAILSAFE, HTTP, API)
CONNECT_S = 1.0
READY = "failsafe ready members=1"
LEASE_S = 10.0
PERIOD_S = 0.2
"""The interval between two lines of the sample collector."""

OUTAGE_S = 2.0
"""How long the work has to go on after the lease's end, at which the role would be lost without failsafe."""

pytestmark = pytest.mark.timeout(BUILD_S + 200)  # the first test builds the image


@pytest.fixture
def containers(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine("rm", "--all", "--force", "--time=0", "--volumes")
        engine("volume", "prune", "--force")


def on(host: LanHost) -> str:
    return f"ns:/run/netns/{host.namespace}"


def names(lan: Lan, **others: str) -> list[str]:
    """Options by which a container knows the other hosts by their names."""
    known = {name: host.address for name, host in lan.hosts.items()} | others
    return [f"--add-host={name}:{address}" for name, address in known.items()]


def variables(environment: Mapping[str, str]) -> list[str]:
    return [f"--env={name}={value}" for name, value in environment.items()]


# -- compose ---------------------------------------------------------------------------------------


class Service(NamedTuple):
    """A service of both files. A volume of the image is in place of its tmpfs, whose owner podman cannot set."""

    environment: dict[str, str]
    command: list[str]
    options: list[str]


def service(name: str) -> Service:
    one = COMPOSE["services"].get(name, {})
    other = COMPOSE_FAILSAFE["services"].get(name, {})
    environment = {**one.get("environment", {}), **other.get("environment", {})}
    mounts = [*one.get("volumes", ()), *other.get("volumes", ())]
    options = [f"--volume={mount}" for mount in mounts]
    if entrypoint := other.get("entrypoint"):
        options.append(f"--entrypoint={json.dumps(entrypoint)}")
    command = [*one.get("command", ()), *other.get("command", ())]
    return Service(environment, [word.replace("$$", "$") for word in command], options)


def test_the_work_of_the_compose_sample_goes_on_while_the_coordinator_is_away(
    containers: Engine,
) -> None:
    with a_lan("coordinator", "host-a", "host-b") as lan:

        def start(name: str) -> Container:
            network = on(lan.hosts[name]) if name in lan.hosts else "none"
            environment, command, options = service(name)
            given = [*variables(environment), *options, *(names(lan) if name in lan.hosts else ())]
            return Container(containers, name, given, *command, network=network)

        for _ in range(2):  # the second time the secret exists already
            secret = start("failsafe-secret")
            assert secret.code() == 0, secret.said()
            containers("rm", "failsafe-secret")
        start("coordinator").until_said("coordinator listening")
        hosts = [start(name) for name in ("host-a", "host-b")]
        for host in hosts:
            host.until_said("joined")
        one = until(lambda: next((h for h in hosts if READY in h.said()), None), "failsafe")
        (other,) = (host for host in hosts if host is not one)
        work = f"{one.name} works under epoch 1"

        lan.cut_both_ways("coordinator", "host-a", "host-b")
        one.until_said("failsafe hold begins")
        lease_s = float(
            COMPOSE["services"]["host-a"]["environment"]["FAILOVER_AGENT_FAILOVER_TIMEOUT"]
        )
        lines = one.said().count(work)
        until(
            lambda: one.said().count(work) > lines + lease_s + OUTAGE_S,  # one line a second
            "work beyond the lease",
        )
        lan.heal()
        one.until_said("failsafe hold ended")
        assert "works under" not in other.said()
        assert "demoted" not in one.said().partition(READY)[2]


# -- Kubernetes ------------------------------------------------------------------------------------


class Secrets:
    """The Secrets as docs/container.md has them made, and ConfigMaps, as the kubelet mounts them."""

    def __init__(self, folder: Path, manifests: list[dict[str, Any]]) -> None:
        self._folder = folder
        made = folder / "made"
        made.mkdir()
        key, certificate = make_certificate(made)
        (made / "users").write_text(f"collector:{hash_password('secret', ())}\n")
        (made / "password").write_text("secret\n")
        (made / "failsafe").write_text(f"{'0123456789abcdef' * 2}\n")
        self._secrets = {
            "failover-coordinator-tls": {"tls.crt": certificate, "tls.key": key},
            "failover-coordinator-users": {"users": made / "users"},
            "failover-member": {
                "password": made / "password",
                "ca.crt": certificate,
                "failsafe": made / "failsafe",
            },
        }
        (config,) = [m for m in manifests if m["kind"] == "ConfigMap"]
        self._config: dict[str, str] = config["data"]

    def mount(self, pod_name: str, volume: dict[str, Any]) -> Path:
        """The directory that a volume of a pod is: owned by root, with the pod's group."""
        directory: Path = self._folder / pod_name / volume["name"]
        if directory.exists():
            return directory
        directory.mkdir(parents=True)
        if "emptyDir" in volume:
            mode = 0o777
        elif "secret" in volume:
            texts = {
                key: path.read_text()
                for key, path in self._secrets[volume["secret"]["secretName"]].items()
            }
            self._write(directory, texts, volume["secret"]["defaultMode"])
            mode = 0o777
        else:
            config = volume["configMap"]
            items = config.get("items", [{"key": key, "path": key} for key in self._config])
            texts = {item["path"]: self._config[item["key"]] for item in items}
            self._write(directory, texts, config.get("defaultMode", 0o644))
            mode = 0o777
        os.chown(directory, 0, USER)
        directory.chmod(mode)
        return directory

    @staticmethod
    def _write(directory: Path, texts: Mapping[str, str], mode: int) -> None:
        """Write the files behind symbolic links as the kubelet does, so that a change is one rename."""
        (directory / "..1").mkdir()
        (directory / "..data").symlink_to("..1")
        for name, text in texts.items():
            file = directory / "..1" / name
            file.write_text(text)
            file.chmod(mode)
            os.chown(file, 0, USER)
            (directory / name).symlink_to(f"..data/{name}")


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """The key and the self-signed certificate of the coordinator's Service."""
    if shutil.which("openssl") is None:
        pytest.skip("needs: openssl: apt-get install openssl")
    key, certificate = folder / "tls.key", folder / "tls.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=failover-coordinator"]
    command += ["-addext", "subjectAltName=DNS:failover-coordinator"]
    run(*command, "-keyout", str(key), "-out", str(certificate))
    return key, certificate


class Kubelet:
    """Starts pods of the manifests."""

    def __init__(self, engine: Engine, secrets: Secrets, manifests: list[dict[str, Any]]) -> None:
        self._engine = engine
        self._secrets = secrets
        self._manifests = manifests

    def start(self, name: str, host: LanHost, options: list[str]) -> dict[str, Container]:
        """The containers of the pod of that name, sidecars first."""
        (spec,) = [
            m["spec"]["template"]["spec"]
            for m in self._manifests
            if m["kind"] == "StatefulSet" and m["metadata"]["name"] == name.rpartition("-")[0]
        ]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        found = {}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            given = [*options, *variables(environment_of(container, name, host.address))]
            for mount in container["volumeMounts"]:
                claimed = {"name": mount["name"], "emptyDir": {}}
                directory = self._secrets.mount(name, volumes.get(mount["name"], claimed))
                kind = ":ro" if mount.get("readOnly") else ""
                given.append(f"--volume={directory}:{mount['mountPath']}{kind}")
            if command := container.get("command"):
                given.append(f"--entrypoint={json.dumps(command)}")
            words, its = container.get("args", ()), f"{name}-{container['name']}"
            found[container["name"]] = Container(self._engine, its, given, *words, network=on(host))
        return found


def apply_policies(manifests: list[dict[str, Any]], lan: Lan) -> None:
    """Drop the packets to each pod that its network policies do not allow."""
    pods = {name: pod(manifests, name.rpartition("-")[0]) for name in PODS}
    for name, receiver in pods.items():
        rules = ["add table ip pods"]
        rules += ["add chain ip pods in { type filter hook input priority 1; policy drop; }"]
        rules += ["add rule ip pods in ct state established,related accept"]
        rules += ["add rule ip pods in iif lo accept"]
        rules += [
            f"add rule ip pods in ip saddr {host.address} tcp dport {port} accept"
            for other, host in lan.hosts.items()
            for port in PORTS
            if reaches(manifests, pods.get(other, STRANGER), receiver, port)
        ]
        run(*lan.hosts[name].before, "nft", "; ".join(rules))


def connects(sender: LanHost, receiver: LanHost, port: int) -> bool:
    def attempt() -> bool:
        with suppress(OSError), socket.create_connection((receiver.address, port), CONNECT_S):
            return True
        return False

    return sender.call(attempt)


def is_ready(agent: Container) -> bool:
    """Whether it has logged that it could keep the role by the vote of the other agent."""
    lines = [json.loads(line) for line in agent.said().splitlines() if "failsafe ready" in line]
    return any(line["members"] == 1 for line in lines)


def epochs(collector: Container) -> list[int]:
    """The epoch of each line that a collector has written."""
    lines = [line for line in collector.said().splitlines() if line.startswith("{")]
    return [json.loads(line)["epoch"] for line in lines]


def test_the_work_of_the_kubernetes_sample_goes_on_while_the_coordinator_is_away(
    containers: Engine, tmp_path: Path
) -> None:
    manifests = INSTALLED["one"]
    kubelet = Kubelet(containers, Secrets(tmp_path, manifests), manifests)
    with a_lan(*PODS, "stranger") as lan:
        apply_policies(manifests, lan)
        known = names(lan, **{"failover-coordinator": lan.hosts[PODS[0]].address})
        coordinator, *members = (kubelet.start(name, lan.hosts[name], known) for name in PODS)
        coordinator["coordinator"].until_said("coordinator listening")
        agents = [member["agent"] for member in members]
        until(lambda: any(is_ready(agent) for agent in agents), "failsafe to be ready")
        one = [is_ready(agent) for agent in agents].index(True)
        first, other = lan.hosts[PODS[1 + one]], lan.hosts[PODS[2 - one]]

        def status(path: str, host: LanHost) -> int:
            return host.call(lambda: ask("GET", f"http://{host.address}:{PROBE}{path}").status)

        assert (status("/primary", first), status("/primary", other)) == (200, 503)
        assert (status("/livez", first), status("/livez", other)) == (200, 200)
        stranger = lan.hosts["stranger"]
        assert [port for port in PORTS if connects(stranger, first, port)] == [HTTP]
        assert [port for port in PORTS if connects(other, first, port)] == [FAILSAFE]

        lan.cut_both_ways(*PODS)
        agents[one].until_said("failsafe hold begins")
        count = len(epochs(members[one]["collector"]))
        lines = (LEASE_S + OUTAGE_S) / PERIOD_S
        until(
            lambda: len(epochs(members[one]["collector"])) > count + lines, "work beyond the lease"
        )
        lan.heal()
        agents[one].until_said("failsafe hold ended")
        assert set(epochs(members[one]["collector"])) == {1}
        assert epochs(members[1 - one]["collector"]) == []
        assert status("/primary", first) == 200
