"""The account's variables, and what a worker's environment is made of.

A variable is secret unless said otherwise: its value is never shown again, and is encrypted at rest either way. Every
worker that starts gets all of them, over its template's own.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Mapping

from comfyfleet.clock import Clock
from comfyfleet.control.catalog import Catalog
from comfyfleet.control.keys import Vault
from comfyfleet.control.records import AccountVariable, Endpoint, Template, Workergroup
from comfyfleet.control.store.base import Store
from comfyfleet.control.workers import Workers
from comfyfleet.provision.template import shipped_templates
from comfyfleet.settings.storage import PLACE_OF_S3, S3Settings, s3_of_environment
from comfyfleet.wire.errors import InvalidArguments, NotFound

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# As a process's environment is measured. Linux takes 128 KiB for one variable, and 2 MiB for all of them with the
# arguments: what is over starts no worker at all, and a template's own variables need their part.
MAX_VALUE_BYTES = 65_536
MAX_BYTES = 1_048_576
# What makes a worker this worker, and what would run foreign code in it: never an account's or a template's to say.
_RESERVED = frozenset(
    {"CONTAINER_ID", "REPORT_ADDR", "MASTER_TOKEN", "WORKER_PORT", "PUBLIC_IPADDR", "PATH", "LD_PRELOAD", "PYTHONPATH"}
)
_RESERVED_PREFIXES = ("COMFYFLEET_", "VAST_TCP_PORT_", "LD_")


def is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith(_RESERVED_PREFIXES)


def check_value(name: str, value: str, after: Mapping[str, str]) -> None:
    """Raises InvalidArguments for a value that no process can be given. after: what all the variables would be."""
    size = len(value.encode())
    if size > MAX_VALUE_BYTES or "\0" in value:
        raise InvalidArguments(f"{name} has {size} bytes: at most {MAX_VALUE_BYTES}, and no NUL", field="value")
    if (total := sum(len(f"{one}={text}".encode()) + 1 for one, text in after.items())) > MAX_BYTES:
        raise InvalidArguments(
            f"with {name} the account's variables would have {total} bytes: at most {MAX_BYTES} in all", field="value"
        )


class Account:
    """Variables by name."""

    def __init__(self, *, store: Store, vault: Vault, clock: Clock, variables: Iterable[AccountVariable] = ()) -> None:
        self._store = store
        self._vault = vault
        self._clock = clock
        self._variables = {variable.name: variable for variable in variables}

    @property
    def vault(self) -> Vault:
        return self._vault

    def variables(self) -> list[tuple[AccountVariable, str | None]]:
        """Each with its value, None for a secret one."""
        return [
            (variable, None if variable.is_secret else self._open(variable))
            for _, variable in sorted(self._variables.items())
        ]

    def replace(self, variables: Iterable[AccountVariable]) -> None:
        """All of them anew, as the store has them."""
        self._variables = {variable.name: variable for variable in variables}

    async def set(self, name: str, value: str, *, is_secret: bool = True) -> None:
        """Raises InvalidArguments for a name that is none, or is not the account's to set."""
        if not NAME.fullmatch(name) or is_reserved(name):
            raise InvalidArguments(f"{name!r} cannot be an account variable", field="name")
        check_value(name, value, {**self.environment(), name: value})
        variable = AccountVariable(
            name=name,
            sealed=self._vault.seal(value, f"variable {name}"),
            is_secret=is_secret,
            updated_at=self._clock.now(),
        )
        await self._store.put(variable)
        self._variables[name] = variable

    async def unset(self, name: str) -> None:
        if name not in self._variables:
            raise NotFound("there is no such variable", name=name)
        await self._store.drop(AccountVariable, name)
        del self._variables[name]

    def environment(self) -> dict[str, str]:
        """All values in the clear: for a worker's environment and nothing else."""
        return {name: self._open(variable) for name, variable in self._variables.items()}

    def _open(self, variable: AccountVariable) -> str:
        return self._vault.open(variable.sealed, f"variable {variable.name}")


class WorkerEnvironment:
    """What a worker of a group starts with, beyond what the provider gives every worker."""

    def __init__(self, catalog: Catalog, account: Account) -> None:
        self._catalog = catalog
        self._account = account

    def __call__(self, endpoint: Endpoint, group: Workergroup) -> Mapping[str, str]:
        """Template first, account over it; the endpoint's name and template for the worker's own use."""
        template = self._catalog.template(group.template_hash)
        return {
            **(template_environment(template) if template is not None else {}),
            **self._account.environment(),
            "COMFYFLEET_ENDPOINT": endpoint.endpoint_name,
            "COMFYFLEET_TEMPLATE": (template.name if template is not None else "") or group.template_hash,
        }


class WorkersStorage:
    """The S3 settings that an endpoint's workers bring of their own, as far as the control plane can tell."""

    def __init__(
        self, catalog: Catalog, environment: WorkerEnvironment, workers: Workers, inherited: Mapping[str, str] | None
    ) -> None:
        """inherited: what every worker starts from; None where that is another machine's."""
        self._catalog = catalog
        self._environment = environment
        self._workers = workers
        self._inherited = inherited

    def __call__(self, endpoint_id: int) -> S3Settings | None:
        """What any of its workgroups brings; None where nobody here can say (other machines, foreign workers)."""
        endpoint = self._catalog.endpoint(endpoint_id)
        is_foreign = any(worker.is_foreign for worker in self._workers.of_endpoint(endpoint_id))
        if self._inherited is None or endpoint is None or is_foreign:
            return None
        brought = dict(self._inherited)
        for group in self._catalog.workergroups(endpoint_id):
            brought.update(self._environment(endpoint, group))
        return s3_of_environment({name: brought.get(name, "") for name in PLACE_OF_S3}) or S3Settings()


def template_environment(template: Template) -> dict[str, str]:
    """The `-e NAME=VALUE` flags of a template's docker string; other flags (ports) mean nothing to a process."""
    words = shlex.split(template.env)
    found: dict[str, str] = {}
    for flag, value in itertools.pairwise(words):
        name, has_value, text = value.partition("=")
        if flag in ("-e", "--env") and has_value and NAME.fullmatch(name) and not is_reserved(name):
            found[name] = text
    return found


def built_in_templates() -> list[Template]:
    """The package's own templates, under their names and content hashes; ids from 0 down are theirs."""
    return [
        Template(
            id=-number,
            hash_id=template.hash_id,
            created_at=0.0,
            name=template.name,
            desc=template.description,
            env=template.docker_flags(),
        )
        for number, template in enumerate(shipped_templates())
    ]
