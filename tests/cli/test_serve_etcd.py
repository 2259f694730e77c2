"""The settings of several coordinators: what contradicts one another is one error, before anything is begun."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Cli

ETCD = ("--store=etcd", "--etcd-endpoint=http://127.0.0.1:1")
COMPLETE = (*ETCD, "--advertise=http://127.0.0.1:2")


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (("--store=etcd", COMPLETE[-1]), "etcd needs etcd_endpoint too"),
        (ETCD, "etcd needs advertise too"),
        (("--etcd-endpoint=http://127.0.0.1:1",), 'needs store = "etcd"'),
        ((*COMPLETE, "--etcd-endpoint=http://10.0.0.1:1"), "http://10.0.0.1:1 carries roles"),
        ((*ETCD, "--advertise=http://10.0.0.1:1"), "http://10.0.0.1:1 carries roles"),
        ((*ETCD, "--advertise=HTTP://10.0.0.1:1"), "http://10.0.0.1:1 carries roles"),
        (
            (*ETCD, "--advertise=http://127.0.0.1:2/path"),
            "must be http(s)://HOST[:PORT], and nothing else",
        ),
        (
            (*ETCD, "--advertise=http://127.0.0.1:2?"),
            "must be http(s)://HOST[:PORT], and nothing else",
        ),  # even an empty one
        (
            (*COMPLETE, "--etcd-endpoint=http://127.0.0.1:1/#"),
            "must be http(s)://HOST[:PORT], and nothing else",
        ),
        ((*COMPLETE, "--etcd-endpoint=ftp://127.0.0.1:1"), "http"),
        ((*COMPLETE, "--etcd-prefix=x"), "must be like /failover-agent"),
        ((*COMPLETE, "--etcd-prefix=/x/"), "must be like /failover-agent"),
        ((*COMPLETE, "--shards=0"), "1"),
        ((*COMPLETE, "--shards=1025"), "1024"),
        ((*COMPLETE, "--leadership-ttl=0.5"), "1"),
        ((*COMPLETE, "--etcd-username=u"), "needs etcd_password_file too"),
        ((*COMPLETE, f"--etcd-certificate={__file__}"), "needs etcd_key too"),
    ],
)
def test_a_contradiction_is_one_error(cli: Cli, flags: tuple[str, ...], wrong: str) -> None:
    code, _, err = cli("serve", "--listen=127.0.0.1:0", *flags)
    assert code == 12
    assert wrong in err
    assert len(err.splitlines()) == 1


def test_required_client_certificates_would_shut_the_other_coordinators_out(
    cli: Cli, tmp_path: Path
) -> None:
    flags = ["--tls-client-certificates=required"]
    for flag in ("--tls-certificate", "--tls-key", "--tls-client-ca-file"):
        file = tmp_path / flag.strip("-")
        file.touch(0o600)
        flags.append(f"{flag}={file}")
    code, _, err = cli("serve", "--listen=127.0.0.1:0", *COMPLETE, *flags)
    assert code == 12
    assert 'cannot be "required" with store = "etcd"' in err
    assert len(err.splitlines()) == 1


def test_other_stores_import_nothing_of_etcd() -> None:
    code = (
        "import sys, agent.coordinator.server, agent.cli.serve;"
        "words = 'etcd', 'leadership', 'forward', 'peer';"
        "print([m for m in sys.modules if m.startswith('agent.') and any(w in m for w in words)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
