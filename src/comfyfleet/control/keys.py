"""Keys: the admin key, made keys, endpoint keys; and the master secret they hang on. Turns a key into a principal.

Made keys are kept as SHA-256 digests. An endpoint's key is derived (HMAC of the master secret, endpoint id, key
generation), because listings must show it; raising the generation revokes it. `Vault` encrypts what must outlive a
restart (account variables, secrets inside jobs). All checks are synchronous, from memory.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from comfyfleet.clock import Clock
from comfyfleet.control.auth import ADMIN, JOBS, MANAGE, NO_LIMITS, READ, ROUTE, Principal
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.records import ApiKey, Endpoint, KeyLimits
from comfyfleet.ids import Ids
from comfyfleet.sealing import Sealer
from comfyfleet.web import whole_number
from comfyfleet.wire.errors import Unauthorized

ADMIN_PREFIX = "cfa_"
KEY_PREFIX = "cfk_"
ENDPOINT_PREFIX = "cfe_"


def digest(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def secret_file(path: Path, make: bytes) -> tuple[bytes, bool]:
    """The secret in `path`, or `make` written there with mode 0600; True when it was made now.

    Two processes that start at once agree on one secret: the file appears whole, by a link, or not at all.
    """
    if path.exists():
        return path.read_bytes().strip(), False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(make + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return path.read_bytes().strip(), False
        return make, True
    finally:
        draft.unlink()


class Vault:
    """Text sealed at rest under the master secret; each purpose has a key of its own, so nothing can be moved."""

    def __init__(self, master: bytes) -> None:
        self._master = master

    def seal(self, text: str, purpose: str) -> str:
        return base64.b64encode(Sealer(self._master, purpose).seal(text.encode())).decode()

    def open(self, sealed: str, purpose: str) -> str:
        """Raises CannotOpen for a value sealed with another master secret or for another purpose."""
        return Sealer(self._master, purpose).open(base64.b64decode(sealed)).decode()


class Keyring:
    """Every key this control plane knows."""

    def __init__(
        self, *, admin_key: str, master: bytes, catalog: Catalog, clock: Clock, keys: Iterable[ApiKey] = ()
    ) -> None:
        self._admin_digest = digest(admin_key)
        self._master = master
        self._catalog = catalog
        self._clock = clock
        self._endpoint_keys: dict[tuple[int, int], str] = {}  # by id and generation: each `/route/` asks for one
        self.replace(keys)
        self._admin = Principal(scope="admin", scopes=frozenset({ADMIN}))

    def principal(self, key: str) -> Principal:
        """Who holds `key`. Raises Unauthorized for an unknown, expired or empty one."""
        if not key:
            raise Unauthorized("a key is needed")
        if key.startswith(ENDPOINT_PREFIX):
            return self._endpoint_principal(key)
        given = digest(key)
        if hmac.compare_digest(given, self._admin_digest):
            return self._admin
        known = self._by_digest.get(given)
        if known is None:
            raise Unauthorized("this key is not known")
        if known.expires_at is not None and known.expires_at <= self._clock.now():
            raise Unauthorized("this key has expired")
        return Principal(
            scope=f"key:{known.id}",
            scopes=frozenset(known.scopes),
            endpoint_ids=frozenset(known.endpoint_ids),
            limits=known.limits,
        )

    def endpoint_key(self, endpoint: Endpoint) -> str:
        """The key that listings show for an endpoint: good for its `/route/`, jobs and reading."""
        named = (endpoint.id, endpoint.key_generation)
        if (known := self._endpoint_keys.get(named)) is not None:
            return known
        message = f"endpoint key\n{endpoint.id}\n{endpoint.key_generation}".encode()
        code = base64.urlsafe_b64encode(hmac.new(self._master, message, hashlib.sha256).digest()).decode().rstrip("=")
        return self._endpoint_keys.setdefault(named, f"{ENDPOINT_PREFIX}{endpoint.id}_{code}")

    def shown_key(self, endpoint: Endpoint, principal: Principal, own_key: str) -> str:
        """What a listing shows as the endpoint's key: the endpoint's own to who manages it, else the caller's.

        A caller with fewer rights, or with limits, would otherwise read a key there that has more, or none.
        """
        return self.endpoint_key(endpoint) if principal.may(MANAGE, endpoint.id) else own_key

    def opens(self, endpoint_id: int) -> bool:
        """Whether there is a living endpoint of that id, for a key to be bound to."""
        endpoint = self._catalog.endpoint(endpoint_id)
        return endpoint is not None and endpoint.deleted_at is None

    def limits(self, scope: str) -> KeyLimits:
        """What the key with that scope may use; a scope without a made key has no limits, and weight 1."""
        key = self._by_scope.get(scope)
        return NO_LIMITS if key is None else key.limits

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """All made keys anew, as the store has them."""
        self._by_digest: dict[str, ApiKey] = {}
        self._by_scope: dict[str, ApiKey] = {}
        for key in keys:
            self.put(key)

    def put(self, key: ApiKey) -> None:
        self._by_digest[key.digest] = key
        self._by_scope[f"key:{key.id}"] = key

    def drop(self, key_id: str) -> None:
        self._by_digest = {key.digest: key for key in self._by_digest.values() if key.id != key_id}
        self._by_scope.pop(f"key:{key_id}", None)

    def made_keys(self) -> list[ApiKey]:
        return sorted(self._by_digest.values(), key=lambda key: key.created_at)

    def _endpoint_principal(self, key: str) -> Principal:
        number, _, _ = key.removeprefix(ENDPOINT_PREFIX).partition("_")
        endpoint_id = whole_number(number)
        endpoint = None if endpoint_id is None else self._catalog.endpoint(endpoint_id)
        if endpoint is None or not hmac.compare_digest(self.endpoint_key(endpoint).encode(), key.encode()):
            raise Unauthorized("this endpoint key is not valid")
        return Principal(
            scope=f"endpoint:{endpoint.id}",
            scopes=frozenset({ROUTE, JOBS, READ}),
            endpoint_ids=frozenset({endpoint.id}),
        )


def new_key(ids: Ids) -> str:
    """A fresh key; shown once, kept as its digest."""
    return ids.token(KEY_PREFIX)
