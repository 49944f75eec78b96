"""`/api/v0/template/`: how workers are set up, named by a hash of their content."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request

from comfyfleet.control.api.calling import Caller, add, given
from comfyfleet.control.api.market import selected
from comfyfleet.control.management import Management
from comfyfleet.control.market import template_rows
from comfyfleet.web import JsonResponse


class TemplateBody(msgspec.Struct, kw_only=True):
    """A template's content; `env` is a docker flag string (`-e K=V -p a:b`)."""

    name: str | None = None
    image: str | None = None
    tag: str | None = None
    href: str | None = None
    repo: str | None = None
    env: str | None = None
    onstart: str | None = None
    runtype: str | None = None
    ssh_direct: bool | None = None
    jup_direct: bool | None = None
    use_ssh: bool | None = None
    use_jupyter_lab: bool | None = None
    jupyter_dir: str | None = None
    docker_login_repo: str | None = None
    extra_filters: dict[str, Any] | None = None
    recommended_disk_space: float | None = None
    readme: str | None = None
    readme_visible: bool | None = None
    desc: str | None = None
    private: bool | None = None
    args_str: str | None = None
    volume_info: dict[str, Any] | None = None


class TemplateName(msgspec.Struct, kw_only=True):
    """Which template to delete."""

    template_id: int | None = None
    hash_id: str = ""


def router(management: Management, caller: Caller) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["templates"])

    async def list_templates(request: Request) -> JsonResponse:
        principal = await caller.principal(request)
        found = template_rows(management.templates(principal), selected(request))
        return JsonResponse({"success": True, "templates": found, "templates_found": len(found), "results": found})

    async def create_template(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, TemplateBody)
        template = await management.create_template(principal, given(body))
        return JsonResponse({"success": True, "template": template, "hash_id": template.hash_id, "id": template.id})

    async def replace_template(request: Request) -> JsonResponse:
        """A template never changes in place, its hash is its content: the answer carries the new one."""
        return await create_template(request)

    async def delete_template(request: Request) -> JsonResponse:
        principal, body = await caller.call(request, TemplateName)
        template = await management.delete_template(principal, body.template_id, body.hash_id)
        return JsonResponse({"success": True, "msg": f"template {template.hash_id} deleted"})

    base = ["/api/v0/template/"]
    add(routes, ["GET"], base, list_templates, summary="List templates")
    add(routes, ["POST"], base, create_template, summary="Create a template", body=TemplateBody)
    add(routes, ["PUT"], ["/api/v1/template/", *base], replace_template, summary="A changed copy", body=TemplateBody)
    add(routes, ["DELETE"], base, delete_template, summary="Delete an unused template", body=TemplateName)
    return routes
