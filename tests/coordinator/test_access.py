"""The settings of authentication: what has to come together, what is watched, and what is warned of."""

import json
import logging
from pathlib import Path

import httpx2
import pytest
from joserfc.jwk import KeySet

from agent.coordinator.access import FILES, RELOADABLE, Access
from agent.coordinator.auth import hash_password
from agent.coordinator.server import serving
from agent.errors import ConfigError
from agent.schema.addresses import Address
from agent.schema.coordinator_settings import CoordinatorSettings
from agent.schema.fields import settings_of
from tests.declarations import load

from .test_auth import KEY, bearer

LISTEN = {"listen": "127.0.0.1:0", "store": "memory"}


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.touch(0o600)
    path.write_text(f"ann:{hash_password('s', ('ops',))}\n")
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(KeySet([KEY]).as_dict(private=False)))
    return path


def test_every_file_that_a_reload_reads_is_watched() -> None:
    files = {
        setting.name
        for setting in settings_of(CoordinatorSettings)
        if setting.name in RELOADABLE and setting.value_type is Path
    }
    assert files == set(FILES)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"administrator": ["user:ann"]}, "administrator.*needs authentication"),
        ({"administrator": ["ann"]}, "user:NAME, client:ID or role:NAME"),
        ({"administrator": ["group:ann"]}, "administrator"),
        ({"administrator": ["user:"]}, "administrator"),
        ({"administrator": ["role: ops"]}, "administrator"),
        ({"administrator": [f"user:u{n}" for n in range(101)]}, "at most 100 identities"),
        ({"token_tenant": "t"}, "token.tenant.*needs token_keys_file or token_keys_url"),
        ({"tls_client_certificates": "required"}, "needs tls_client_ca_file"),
        ({"token_keys_url": "https://id.example/jwks"}, "token_issuer and token_audience"),
        ({"token_keys_url": "http://id.example/jwks"}, "must be https"),
        ({"token_keys_url": "https://me:pw@id.example/jwks"}, "credentials"),
        ({"token_issuer": "i"}, "token_keys_file"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(
    given: dict[str, object], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault) as refused:
        load(CoordinatorSettings, LISTEN | given)
    assert len(str(refused.value).splitlines()) == 1


def test_a_ca_of_clients_needs_tls(keys: Path) -> None:
    with pytest.raises(ConfigError, match="needs tls_certificate and tls_key"):
        load(CoordinatorSettings, LISTEN | {"tls_client_ca_file": str(keys)})


def test_keys_come_from_a_file_or_from_a_url(keys: Path) -> None:
    tokens = {"token_issuer": "i", "token_audience": "a", "token_keys_file": str(keys)}
    load(CoordinatorSettings, LISTEN | tokens)
    with pytest.raises(ConfigError, match="keep one of the two"):
        load(CoordinatorSettings, LISTEN | tokens | {"token_keys_url": "https://id.example/"})


def test_administrators_are_a_list_in_each_source(
    users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILOVER_COORDINATOR_ADMINISTRATOR", "user:ann, role:ops")
    given = LISTEN | {"users_file": str(users)}
    assert load(CoordinatorSettings, given).administrator == ("user:ann", "role:ops")
    flags = given | {"administrator": ("client:4711",)}
    assert load(CoordinatorSettings, flags).administrator == ("client:4711",)


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({}, []),
        ({"users": True, "administrator": ["user:ann", "role:ops"]}, []),
        ({"users": True}, ["no administrator is set"]),
        ({"users": True, "administrator": ["user:bob"]}, ["administrator does not exist"]),
        (
            {"keys": True, "administrator": ["client:4711"]},
            ["tokens of every tenant may use the tenant 'default'"],
        ),
        ({"keys": True, "administrator": ["client:4711"], "token_tenant": "t"}, []),
    ],
)
def test_settings_that_may_be_a_mistake_are_logged_at_the_start(
    users: Path,
    keys: Path,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, object],
    lines: list[str],
) -> None:
    caplog.set_level(logging.INFO)
    files: dict[str, object] = {}
    if given.pop("users", False):
        files["users_file"] = str(users)
    if given.pop("keys", False):
        files |= {"token_issuer": "i", "token_audience": "a", "token_keys_file": str(keys)}
    Access(load(CoordinatorSettings, LISTEN | files | given))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(lines)
    assert all(line in text for line, text in zip(lines, said, strict=True))


def test_the_tenant_of_tokens_can_be_set_by_a_reload(keys: Path) -> None:
    tokens = {"token_issuer": "i", "token_audience": "a", "token_keys_file": str(keys)}
    access = Access(load(CoordinatorSettings, LISTEN | tokens))
    wanted = load(CoordinatorSettings, LISTEN | tokens | {"token_tenant": "t"})
    assert access.merge_reloadable(wanted) == (wanted, [])


def test_a_secret_that_others_can_read_now_is_refused_as_at_the_start(users: Path) -> None:
    """When it changes: otherwise the next start would fail, perhaps after months."""
    settings = load(CoordinatorSettings, LISTEN | {"users_file": str(users)})
    access = Access(settings)
    assert access.check_again() == settings
    users.chmod(0o644)
    with pytest.raises(ConfigError, match=r"^users_file = .+: must not be readable"):
        access.check_again()
    users.unlink()
    with pytest.raises(ConfigError, match="must be a file that exists"):
        access.check_again()


async def test_a_coordinator_starts_without_its_identity_provider() -> None:
    """Tokens are answered 503 until the keys are there."""
    provider = CoordinatorSettings(listen=Address("127.0.0.1", 0), store="memory")
    async with serving(provider) as other:  # serves no keys: an answer that is not a JWKS
        settings = CoordinatorSettings(
            listen=Address("127.0.0.1", 0),
            store="memory",
            token_issuer="https://id",
            token_audience="failover",
            token_keys_url=f"{other}/healthz",
        )
        async with serving(settings) as url, httpx2.AsyncClient(trust_env=False) as http:
            header = {"authorization": bearer().decode()}
            answer = await http.get(f"{url}/api/v1/clientfailover/groups", headers=header)
            assert answer.status_code == 503
            assert "keys of the identity provider" in answer.json()["Reason"]
            assert (await http.get(f"{url}/healthz")).status_code == 200
            page = (await http.get(f"{url}/metrics")).text
            assert 'failover_coordinator_token_key_fetches_total{outcome="fetched"} 0.0' in page
