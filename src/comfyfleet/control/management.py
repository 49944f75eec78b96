"""Endpoints, workergroups and templates: made, changed and deleted here; the store first, then the catalogue.

Not their HTTP (`api.endpoints`, `api.workergroups`, `api.templates`) and not what the changes set in motion: the
autoscaler and the reconciler read the catalogue.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from comfyfleet.clock import Clock
from comfyfleet.control.auth import MANAGE, READ, Principal
from comfyfleet.control.bounds import check_bounds
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.jobs import content_digest
from comfyfleet.control.logbook import Logbook
from comfyfleet.control.records import Endpoint, EndpointState, Template, Workergroup
from comfyfleet.control.search import parse_search
from comfyfleet.control.store.base import NameTaken, Store
from comfyfleet.wire.errors import InvalidArguments, NotFound

Kind = TypeVar("Kind", Endpoint, Workergroup, Template)

MAX_NAME = 255


def check_name(name: str) -> None:
    """Spaces are fine (the command line's benchmark makes such names); control characters are not."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidArguments(f"endpoint_name must be 1 to {MAX_NAME} printable characters", field="endpoint_name")


class Management:
    """Every method checks the principal's right first."""

    def __init__(self, *, store: Store, catalog: Catalog, logbook: Logbook, clock: Clock) -> None:
        self._store = store
        self._catalog = catalog
        self._logbook = logbook
        self._clock = clock

    # --- endpoints ---------------------------------------------------------------------------------------------------

    def endpoints(self, principal: Principal) -> list[Endpoint]:
        """The living ones this key may see."""
        if not principal.may(MANAGE):
            principal.demand(READ)
        return [
            endpoint
            for endpoint in self._catalog.endpoints()
            if endpoint.deleted_at is None and (principal.may(READ, endpoint.id) or principal.may(MANAGE, endpoint.id))
        ]

    def endpoint(self, principal: Principal, endpoint_id: int) -> Endpoint:
        endpoint = self._catalog.endpoint(endpoint_id)
        if endpoint is None or endpoint.deleted_at is not None or endpoint not in self.endpoints(principal):
            raise NotFound("no such endpoint", endpoint_id=endpoint_id)
        return endpoint

    def endpoint_by(self, principal: Principal, endpoint_id: int | None, name: str) -> Endpoint:
        """By id, else by name. Raises NotFound."""
        if endpoint_id is None:
            named = self._catalog.endpoint_named(name, principal.user_id)
            endpoint_id = named.id if named is not None else 0
        return self.endpoint(principal, endpoint_id)

    def known_endpoint(self, endpoint_id: int) -> Endpoint | None:
        """Without asking who wants to know: for rendering what the caller may see anyway."""
        return self._catalog.endpoint(endpoint_id)

    async def create_endpoint(self, principal: Principal, given: dict[str, Any]) -> Endpoint:
        """given: what the caller set, without nulls. Raises InvalidArguments, also for a name that is taken."""
        principal.demand_account_wide(MANAGE)
        check_name(given.get("endpoint_name", ""))
        check_bounds(given)
        endpoint = _converted(
            {
                **given,
                "id": await self._store.reserve("endpoint"),
                "created_at": self._clock.now(),
                "user_id": principal.user_id,
            },
            Endpoint,
        )
        await self._put_endpoint(endpoint)
        self._logbook.write("info0", f"endpoint {endpoint.endpoint_name!r} created", endpoint_id=endpoint.id)
        return endpoint

    async def update_endpoint(self, principal: Principal, endpoint_id: int, given: dict[str, Any]) -> Endpoint:
        """Change what is given, leave the rest."""
        endpoint = self.endpoint(principal, endpoint_id)
        principal.demand(MANAGE, endpoint_id)
        if "endpoint_name" in given:
            check_name(given["endpoint_name"])
        check_bounds(given)
        if given.get("endpoint_state") == EndpointState.DESTROYED:
            raise InvalidArguments("delete the endpoint to destroy it", field="endpoint_state")
        changed = _converted({**msgspec.structs.asdict(endpoint), **given}, Endpoint)
        await self._put_endpoint(changed)
        for name in sorted(given):
            before, after = getattr(endpoint, name), getattr(changed, name)
            if before != after:
                self._logbook.write("info0", f"{name}: {before} -> {after}", endpoint_id=endpoint_id)
        return changed

    async def rotate_endpoint_key(self, principal: Principal, endpoint_id: int) -> Endpoint:
        """The next key generation: the old endpoint key stops working at once."""
        endpoint = self.endpoint(principal, endpoint_id)
        principal.demand(MANAGE, endpoint_id)
        changed = msgspec.structs.replace(endpoint, key_generation=endpoint.key_generation + 1)
        await self._put_endpoint(changed)
        return changed

    async def delete_endpoint(self, principal: Principal, endpoint_id: int) -> Endpoint:
        """Mark it and its workergroups deleted; workers drain, then go, then the records."""
        endpoint = self.endpoint(principal, endpoint_id)
        principal.demand(MANAGE, endpoint_id)
        for group in self._catalog.workergroups(endpoint_id):
            await self._put_workergroup(msgspec.structs.replace(group, deleted_at=self._clock.now()))
        gone = msgspec.structs.replace(endpoint, deleted_at=self._clock.now(), endpoint_state=EndpointState.DESTROYED)
        await self._put_endpoint(gone)
        self._logbook.write("info0", "endpoint deleted", endpoint_id=endpoint_id)
        return gone

    async def _put_endpoint(self, endpoint: Endpoint) -> None:
        try:
            await self._store.put(endpoint)
        except NameTaken as error:
            raise InvalidArguments(
                f"an endpoint named {endpoint.endpoint_name!r} exists already", field="endpoint_name"
            ) from error
        self._catalog.put_endpoint(endpoint)

    # --- workergroups ------------------------------------------------------------------------------------------------

    def workergroups(self, principal: Principal) -> list[Workergroup]:
        visible = {endpoint.id for endpoint in self.endpoints(principal)}
        return [
            group for group in self._catalog.workergroups() if group.deleted_at is None and group.endpoint_id in visible
        ]

    def workergroup(self, principal: Principal, workergroup_id: int) -> Workergroup:
        for group in self.workergroups(principal):
            if group.id == workergroup_id:
                return group
        raise NotFound("no such workergroup", workergroup_id=workergroup_id)

    async def create_workergroup(self, principal: Principal, given: dict[str, Any]) -> Workergroup:
        """Names its endpoint by id or name, its template by hash, id or built-in name. Raises InvalidArguments."""
        principal.demand(MANAGE)
        endpoint = self._owner(principal, given)
        principal.demand(MANAGE, endpoint.id)
        template = self._template(given)
        values = {
            **given,
            **_search(given),
            "id": await self._store.reserve("workergroup"),
            "endpoint_id": endpoint.id,
            "endpoint_name": endpoint.endpoint_name,
            "template_hash": template.hash_id,
            "template_id": template.id,
            "created_at": self._clock.now(),
            "user_id": principal.user_id,
        }
        check_bounds(values)
        group = _converted(values, Workergroup)
        await self._put_workergroup(group)
        text = f"workergroup {group.id} created with template {template.name or template.hash_id}"
        self._logbook.write("info0", text, endpoint_id=endpoint.id, workergroup_id=group.id)
        return group

    async def update_workergroup(self, principal: Principal, workergroup_id: int, given: dict[str, Any]) -> Workergroup:
        group = self.workergroup(principal, workergroup_id)
        principal.demand(MANAGE, group.endpoint_id)
        check_bounds(given)
        values = {**msgspec.structs.asdict(group), **given, **_search(given)}
        if given.get("template_hash") or given.get("template_id") is not None:
            template = self._template(given)
            values.update(template_hash=template.hash_id, template_id=template.id)
        values.update(endpoint_id=group.endpoint_id, endpoint_name=group.endpoint_name)
        changed = _converted(values, Workergroup)
        await self._put_workergroup(changed)
        return changed

    async def delete_workergroup(self, principal: Principal, workergroup_id: int) -> Workergroup:
        group = self.workergroup(principal, workergroup_id)
        principal.demand(MANAGE, group.endpoint_id)
        gone = msgspec.structs.replace(group, deleted_at=self._clock.now())
        await self._put_workergroup(gone)
        self._logbook.write(
            "info0", "workergroup deleted", endpoint_id=group.endpoint_id, workergroup_id=workergroup_id
        )
        return gone

    async def set_rolling_update(self, principal: Principal, workergroup_id: int, *, is_updating: bool) -> Workergroup:
        """Ask for, or call off, an update of every worker of the group; the reconciler drains and restarts them."""
        group = self.workergroup(principal, workergroup_id)
        principal.demand(MANAGE, group.endpoint_id)
        generation = group.update_generation + 1 if is_updating else group.update_generation
        changed = msgspec.structs.replace(group, update_generation=generation, is_updating=is_updating)
        await self._put_workergroup(changed)
        text = "rolling update asked for" if is_updating else "rolling update called off"
        self._logbook.write("info0", text, endpoint_id=group.endpoint_id, workergroup_id=workergroup_id)
        return changed

    async def _put_workergroup(self, group: Workergroup) -> None:
        await self._store.put(group)
        self._catalog.put_workergroup(group)

    def _owner(self, principal: Principal, given: dict[str, Any]) -> Endpoint:
        for endpoint in self.endpoints(principal):
            if given.get("endpoint_id") == endpoint.id or (
                given.get("endpoint_id") is None and given.get("endpoint_name") == endpoint.endpoint_name
            ):
                return endpoint
        raise InvalidArguments(
            "endpoint_id or endpoint_name must name an endpoint of yours",
            field="endpoint_id",
            endpoint_id=given.get("endpoint_id"),
            endpoint_name=given.get("endpoint_name"),
        )

    # --- templates ---------------------------------------------------------------------------------------------------

    def templates(self, principal: Principal) -> list[Template]:
        principal.demand_account_wide(READ)
        return self._catalog.templates()

    async def create_template(self, principal: Principal, given: dict[str, Any]) -> Template:
        """A template; the same content again is the same template."""
        principal.demand_account_wide(MANAGE)
        hash_id = content_digest(given)[:32]
        if (known := self._catalog.template(hash_id)) is not None:
            return known
        values = {
            **given,
            "id": await self._store.reserve("template"),
            "hash_id": hash_id,
            "created_at": self._clock.now(),
        }
        template = _converted(values, Template)
        await self._store.put(template)
        self._catalog.put_template(template)
        return template

    async def delete_template(self, principal: Principal, template_id: int | None, hash_id: str) -> Template:
        """Raises InvalidArguments while a workergroup uses it."""
        principal.demand_account_wide(MANAGE)
        template = self._template({"template_id": template_id, "template_hash": hash_id})
        users = [group.id for group in self._catalog.workergroups() if group.template_hash == template.hash_id]
        if users:
            raise InvalidArguments("a workergroup uses this template", field="hash_id", workergroup_ids=users)
        await self._store.drop(Template, template.hash_id)
        self._catalog.drop_template(template.hash_id)
        return template

    def _template(self, given: dict[str, Any]) -> Template:
        wanted = str(given.get("template_hash") or "")
        for template in self._catalog.templates():
            if wanted and wanted in (template.hash_id, template.name):
                return template
            if not wanted and given.get("template_id") is not None and template.id == given["template_id"]:
                return template
        raise InvalidArguments(
            f"no template {wanted or given.get('template_id')!r}"
            if wanted
            else "template_hash or template_id is needed",
            field="template_hash",
        )


def _search(given: dict[str, Any]) -> dict[str, Any]:
    """`search_params` as text or query dict, into both fields."""
    params = given.get("search_params")
    if params is None:
        return {}
    if isinstance(params, dict):
        return {"search_params": "", "search_query": params}
    return {"search_params": params, "search_query": parse_search(params)}


def _converted(values: dict[str, Any], kind: type[Kind]) -> Kind:
    """A record from wire values; unknown names are left out. Raises InvalidArguments naming the field."""
    known = {field.name for field in msgspec.structs.fields(kind)}
    try:
        return msgspec.convert({name: value for name, value in values.items() if name in known}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArguments(str(error)) from error
