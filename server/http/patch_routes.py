"""Routes that list, load and remove row patches."""

from typing import Any, Protocol

from fastapi import APIRouter, Request
from pydantic import Field

from server.http.authentication import key_of
from server.http.errors import ApiError
from server.http.request_body import RequestBody
from server.http.response_models import DeletedPatch, ErrorBody, MemoryPatch, MemoryPatchList
from server.http.served_patches import ServedPatch, check_key
from server.http.service import Service
from server.patch_options import PATCH_NAME

_CONFLICT = {
    "model": ErrorBody,
    "description": "the name is in use, is being loaded, or is that of a default patch",
}


class LoadPatchRequest(RequestBody):
    """Load a row patch."""

    name: str = Field(
        pattern=f"^{PATCH_NAME}$",
        description="its name in --patch, or that of its folder in --patch-dir",
    )


class PatchChanges(Protocol):
    """Loads and removes row patches for the routes."""

    async def load(self, name: str) -> object:
        """Load a patch as ``ServedPatches.load`` does."""
        ...

    async def unload(self, name: str) -> None:
        """Remove a patch as ``ServedPatches.unload`` does."""
        ...


def patch_routes(service: Service, changes: PatchChanges) -> APIRouter:
    """``GET`` and ``POST /v1/memory/patches``, ``DELETE /v1/memory/patches/{name}``.

    After ``changes`` has loaded a patch, ``service.patches`` has it.
    """
    router = APIRouter(tags=["memory"])

    @router.get("/v1/memory/patches", responses={200: {"model": MemoryPatchList}})
    async def patches(request: Request) -> dict[str, Any]:
        """The loaded row patches that requests with this key may use."""
        served = service.patches.of_key(key_of(request.scope))
        return {"object": "list", "data": [_patch(one) for one in served]}

    @router.post(
        "/v1/memory/patches", responses={200: {"model": MemoryPatch}, 409: dict(_CONFLICT)}
    )
    async def load(body: LoadPatchRequest, request: Request) -> dict[str, Any]:
        """Load a row patch; the server checks it first. If there are keys, it needs one with the
        role admin."""
        _check_admin(request, body.name)
        await changes.load(body.name)
        return _patch(service.patches[body.name])

    @router.delete(
        "/v1/memory/patches/{name}",
        responses={200: {"model": DeletedPatch}, 409: dict(_CONFLICT)},
    )
    async def remove(name: str, request: Request) -> dict[str, Any]:
        """Remove a row patch; requests that use it finish with it. If there are keys, it needs one
        with the role admin."""
        _check_admin(request, name)
        await changes.unload(name)
        return {"object": "memory_patch.deleted", "name": name, "deleted": True}

    return router


def _check_admin(request: Request, patch: str) -> None:
    """Raise ApiError (403) if the request's key may not change a patch."""
    key = key_of(request.scope)
    if key is not None and not key.is_admin:
        raise ApiError(403, "this needs an API key with the role admin", code="admin_needed")
    check_key(key, patch, "name")


def _patch(served: ServedPatch) -> dict[str, Any]:
    summary = served.summary
    return {
        "object": "memory_patch",
        "name": served.name,
        "created": served.created,
        "default": served.is_default,
        "content_hash": summary.content_hash,
        "rows": summary.num_rows,
        "bytes": summary.num_bytes,
        "tables": dict(summary.tables),
        "data": summary.data,
    }
