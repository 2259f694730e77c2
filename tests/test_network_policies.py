"""The NetworkPolicies of config/kubernetes: who reaches which port, by the rules of Kubernetes.

A name of a port is looked up among the ordinary containers only, since not every network knows those of a sidecar.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from itertools import product
from typing import Any

import pytest

from tests.test_container_files import INSTALLED, environment_of

DIRECTIONS = {"ingress": ("Ingress", "from"), "egress": ("Egress", "to")}
ETCD = "192.0.2.10"
ETCD_PORT = 2379
DNS = 53
RULED = {"collector", "coordinator"}
"""The pods that have network policies."""


@dataclass(frozen=True)
class Place:
    """A sender or receiver: a pod with labels in a namespace, or an address outside the cluster."""

    namespace: str = "default"
    labels: dict[str, str] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    """The ports of its ordinary containers, by name."""
    address: str = ""


def pod(manifests: list[dict[str, Any]], name: str) -> Place:
    (template,) = [
        m["spec"]["template"]
        for m in manifests
        if m["kind"] == "StatefulSet" and m["metadata"]["name"] == name
    ]
    ports = [port for c in template["spec"]["containers"] for port in c["ports"]]
    names = {port["name"]: port["containerPort"] for port in ports}
    return Place(labels=template["metadata"]["labels"], names=names)


def chosen(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "another kind of selector: this test has to learn it"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def is_peer(peer: dict[str, Any], place: Place) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector", "ipBlock"}
    if block := peer.get("ipBlock"):
        assert set(block) == {"cidr"}
        return bool(place.address) and ip_address(place.address) in ip_network(block["cidr"])
    if place.address:
        return False
    if "namespaceSelector" in peer:
        own = {"kubernetes.io/metadata.name": place.namespace}
        return chosen(peer["namespaceSelector"], own) and chosen(
            peer.get("podSelector", {}), place.labels
        )
    return place.namespace == "default" and chosen(peer["podSelector"], place.labels)


def is_port(port: dict[str, Any], receiver: Place, number: int, protocol: str) -> bool:
    assert set(port) <= {"port", "protocol"}
    wanted = port["port"]
    return (
        receiver.names.get(wanted) if isinstance(wanted, str) else wanted
    ) == number and port.get("protocol", "TCP") == protocol


def lets(
    manifests: list[dict[str, Any]],
    direction: str,
    ends: tuple[Place, Place],
    number: int,
    protocol: str,
) -> bool:
    """Whether the policies of one end, for what comes in or goes out, let it through."""
    own, other = ends if direction == "egress" else ends[::-1]
    kind, peers = DIRECTIONS[direction]
    policies = [
        m["spec"]
        for m in manifests
        if m["kind"] == "NetworkPolicy"
        and own.namespace == "default"
        and not own.address
        and chosen(m["spec"]["podSelector"], own.labels)
        and kind in m["spec"]["policyTypes"]
    ]
    return not policies or any(
        any(is_peer(peer, other) for peer in rule[peers])
        and any(is_port(port, ends[1], number, protocol) for port in rule["ports"])
        for policy in policies
        for rule in policy.get(direction, ())
    )


def reaches(
    manifests: list[dict[str, Any]],
    sender: Place,
    receiver: Place,
    number: int,
    protocol: str = "TCP",
) -> bool:
    """Whether a connection from one place to a port of another one is let through at both."""
    ends = (sender, receiver)
    return all(lets(manifests, way, ends, number, protocol) for way in DIRECTIONS)


def listened_at(manifests: list[dict[str, Any]], name: str, suffix: str) -> int:
    """The port that a setting of a program in a pod names."""
    (spec,) = [m["spec"]["template"]["spec"] for m in manifests
               if m["kind"] == "StatefulSet" and m["metadata"]["name"] == name]  # fmt: skip
    found = [
        int(value.rpartition(":")[2])
        for container in [*spec.get("initContainers", ()), *spec["containers"]]
        for variable, value in environment_of(container, f"{name}-0").items()
        if variable.endswith(suffix)
    ]
    (port,) = found
    return port


@pytest.mark.parametrize("install", INSTALLED)
def test_each_place_reaches_the_ports_that_it_needs_and_no_others(install: str) -> None:
    manifests = INSTALLED[install]
    collector, coordinator = (pod(manifests, n) for n in ("collector", "failover-coordinator"))
    places = {
        "collector": collector,
        "coordinator": coordinator,
        "stranger": Place(labels={"app.kubernetes.io/name": "other"}),
        "elsewhere": Place("elsewhere", labels=collector.labels),
        "prometheus": Place("monitoring"),
        "names": Place("kube-system"),
        "etcd": Place(address=ETCD),
    }
    failsafe = listened_at(manifests, "collector", "FAILSAFE_LISTEN")
    probe = listened_at(manifests, "collector", "PROBE_LISTEN")
    http = listened_at(manifests, "collector", "PORT")
    api = listened_at(manifests, "failover-coordinator", "COORDINATOR_LISTEN")
    needed = {
        ("collector", "collector", failsafe),
        ("collector", "coordinator", api),
        ("collector", "names", DNS),
        ("stranger", "collector", http),
        ("prometheus", "collector", probe),
        ("prometheus", "coordinator", api),
    }
    if install == "etcd":
        needed |= {("coordinator", "coordinator", api), ("coordinator", "names", DNS)}
        needed |= {("coordinator", "etcd", ETCD_PORT)}
    for protocol in ("TCP", "UDP"):
        assert {
            (one, other, port)
            for (one, sender), (other, receiver) in product(places.items(), repeat=2)
            for port in (failsafe, probe, http, api, DNS, ETCD_PORT, 22, 80)
            if RULED & {one, other} and reaches(manifests, sender, receiver, port, protocol)
        } == {way for way in needed if protocol == "TCP" or way[2] == DNS}
