"""Keys: what each kind opens, when it stops, and that nothing of a made key is kept but its digest."""

from __future__ import annotations

import stat

import pytest

from comfyfleet.control.auth import Principal
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.keys import Keyring, Vault, digest, new_key, secret_file
from comfyfleet.control.records import ApiKey, Endpoint, KeyLimits
from comfyfleet.ids import SeededIds
from comfyfleet.sealing import CannotOpen
from comfyfleet.wire.errors import Forbidden, NotFound, Unauthorized

SECRET = "cfk_" + "x" * 43


@pytest.fixture
def catalog():
    return Catalog(
        [Endpoint(id=1, endpoint_name="a", created_at=0.0), Endpoint(id=2, endpoint_name="b", created_at=0.0)]
    )


@pytest.fixture
def ring(catalog, clock):
    return Keyring(admin_key="cfa_admin", master=b"m" * 64, catalog=catalog, clock=clock)


def a_key(**fields) -> ApiKey:
    return ApiKey(**{"id": "1", "name": "n", "digest": digest(SECRET), "scopes": ("jobs",), **fields})


def test_the_admin_key_may_everything(ring):
    admin = ring.principal("cfa_admin")
    for right in ("admin", "manage", "read", "route", "jobs"):
        admin.demand(right, 2)


@pytest.mark.parametrize("key", ["", "cfa_wrong", "cfk_wrong", "cfe_1_wrong", "cfe_x_y", "cfe_99_z", "cfe_1", "ключ"])
def test_an_unknown_key_is_refused(ring, key):
    with pytest.raises(Unauthorized):
        ring.principal(key)


def test_a_made_key_has_its_scopes_its_endpoints_and_its_end(ring, clock):
    ring.put(a_key(endpoint_ids=(1,), expires_at=clock.now() + 60, limits=KeyLimits(weight=3)))

    principal = ring.principal(SECRET)
    principal.demand("jobs", 1)
    with pytest.raises(Forbidden):
        principal.demand("manage")
    with pytest.raises(NotFound):
        principal.demand("jobs", 2)
    assert ring.limits(principal.scope).weight == 3
    clock.jump(60)
    with pytest.raises(Unauthorized, match="expired"):
        ring.principal(SECRET)


def test_a_revoked_key_stops_at_once(ring):
    ring.put(a_key())
    ring.drop("1")
    with pytest.raises(Unauthorized):
        ring.principal(SECRET)


def test_an_endpoint_key_is_derived_and_dies_with_its_generation(ring, catalog):
    endpoint = catalog.endpoint(1)
    key = ring.endpoint_key(endpoint)
    principal = ring.principal(key)

    principal.demand("route", 1)
    with pytest.raises(NotFound):
        principal.demand("route", 2)
    assert ring.endpoint_key(catalog.endpoint(2)) != key
    catalog.put_endpoint(Endpoint(id=1, endpoint_name="a", created_at=0.0, key_generation=2))
    with pytest.raises(Unauthorized):
        ring.principal(key)


def test_a_secret_file_is_made_once_and_only_its_owner_may_read_it(tmp_path):
    made, is_new = secret_file(tmp_path / "admin.key", b"one")
    again, is_new_again = secret_file(tmp_path / "admin.key", b"two")

    assert (made, is_new, again, is_new_again) == (b"one", True, b"one", False)
    assert stat.S_IMODE((tmp_path / "admin.key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["admin.key"]


def test_a_sealed_value_opens_only_for_its_purpose_and_master():
    sealed = Vault(b"m" * 64).seal("hunter2", "variable X")

    assert "hunter2" not in sealed
    assert Vault(b"m" * 64).open(sealed, "variable X") == "hunter2"
    for vault, purpose in ((Vault(b"m" * 64), "variable Y"), (Vault(b"n" * 64), "variable X")):
        with pytest.raises(CannotOpen):
            vault.open(sealed, purpose)


def test_new_keys_differ():
    ids = SeededIds(1)
    assert new_key(ids) != new_key(ids)


def test_a_principal_without_endpoints_may_all_of_them():
    assert Principal(scope="s", scopes=frozenset({"read"})).may("read", 5)


def test_a_listing_never_shows_a_key_with_more_rights_than_the_callers_own(ring, catalog):
    endpoint = catalog.endpoint(1)
    ring.put(a_key(scopes=("read",)))

    assert ring.shown_key(endpoint, ring.principal(SECRET), SECRET) == SECRET
    assert ring.shown_key(endpoint, ring.principal("cfa_admin"), "cfa_admin") == ring.endpoint_key(endpoint)
    own = ring.endpoint_key(endpoint)
    assert ring.shown_key(endpoint, ring.principal(own), own) == own


def test_a_key_of_before_that_is_an_admins_and_bound_is_no_longer_everybodys(ring):
    ring.put(a_key(scopes=("admin",), endpoint_ids=(1,)))
    principal = ring.principal(SECRET)

    principal.demand("manage", 1)
    assert principal.sees_all is False
    with pytest.raises(NotFound):
        principal.demand("manage", 2)
    with pytest.raises(Forbidden, match="for some endpoints only"):
        principal.demand_account_wide("admin")
