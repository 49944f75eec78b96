"""Endpoints, workergroups and templates in memory: what `/route/` and the loops look up without a query.

The store is the truth; whoever writes there puts the new record here afterwards. All methods are synchronous and cheap.
Not the live workers (`control.workers`).
"""

from __future__ import annotations

from collections.abc import Iterable

from comfyfleet.control.records import Endpoint, Template, Workergroup


class Catalog:
    """Records by id and endpoints by name. A deleted record that still drains keeps its id, not its name."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint] = (),
        workergroups: Iterable[Workergroup] = (),
        templates: Iterable[Template] = (),
    ) -> None:
        self.replace(endpoints, workergroups, templates)

    def replace(
        self, endpoints: Iterable[Endpoint], workergroups: Iterable[Workergroup], templates: Iterable[Template]
    ) -> None:
        """All of it anew, as the store has it."""
        self._endpoints: dict[int, Endpoint] = {}
        self._names: dict[tuple[int, str], int] = {}
        self._workergroups: dict[int, Workergroup] = {}
        self._templates: dict[str, Template] = {}
        for endpoint in endpoints:
            self.put_endpoint(endpoint)
        for workergroup in workergroups:
            self.put_workergroup(workergroup)
        for template in templates:
            self.put_template(template)

    def endpoint(self, endpoint_id: int) -> Endpoint | None:
        return self._endpoints.get(endpoint_id)

    def endpoint_named(self, name: str, user_id: int = 1) -> Endpoint | None:
        """The living endpoint of that exact name."""
        endpoint_id = self._names.get((user_id, name))
        return None if endpoint_id is None else self._endpoints[endpoint_id]

    def endpoints(self) -> list[Endpoint]:
        """All, oldest first, those that still drain included (`deleted_at` set)."""
        return [self._endpoints[endpoint_id] for endpoint_id in sorted(self._endpoints)]

    def workergroup(self, workergroup_id: int) -> Workergroup | None:
        return self._workergroups.get(workergroup_id)

    def workergroups(self, endpoint_id: int | None = None) -> list[Workergroup]:
        """All, or one endpoint's, oldest first."""
        return [
            group
            for _, group in sorted(self._workergroups.items())
            if endpoint_id is None or group.endpoint_id == endpoint_id
        ]

    def template(self, hash_id: str) -> Template | None:
        return self._templates.get(hash_id)

    def templates(self) -> list[Template]:
        return sorted(self._templates.values(), key=lambda template: template.id)

    def put_endpoint(self, endpoint: Endpoint) -> None:
        before = self._endpoints.get(endpoint.id)
        if before is not None:
            self._names.pop((before.user_id, before.endpoint_name), None)
        self._endpoints[endpoint.id] = endpoint
        if endpoint.deleted_at is None:
            self._names[endpoint.user_id, endpoint.endpoint_name] = endpoint.id

    def drop_endpoint(self, endpoint_id: int) -> None:
        before = self._endpoints.pop(endpoint_id, None)
        if before is not None and before.deleted_at is None:
            self._names.pop((before.user_id, before.endpoint_name), None)

    def put_workergroup(self, workergroup: Workergroup) -> None:
        self._workergroups[workergroup.id] = workergroup

    def drop_workergroup(self, workergroup_id: int) -> None:
        self._workergroups.pop(workergroup_id, None)

    def put_template(self, template: Template) -> None:
        self._templates[template.hash_id] = template

    def drop_template(self, hash_id: str) -> None:
        self._templates.pop(hash_id, None)
