"""Is the process alive, can it serve, and which models: `/health`, `/ready`, `/v1/models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from gateway.state import Services
    from shared.fleet import WorkerInfo

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Say that this process lives; it needs nothing else."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    """Say whether Redis answers and a worker has a model ready; else 503 with the reason.

    `not_ready` tells what the other workers do, one sentence for each.
    """
    services: Services = request.app.state.services
    models = await services.models.ready()
    workers = await services.models.workers()
    return {
        "status": "ready",
        "models": [worker.model for worker in models],
        "workers": sum(w.state == "ready" for w in workers),
        "not_ready": [f"{w.state}: {w.reason}" for w in workers if w.state != "ready"],
        "queue_depth": await services.queue.depth(),
    }


def _model(worker: WorkerInfo) -> dict[str, Any]:
    return {
        "id": worker.model,
        "object": "model",
        "created": worker.since,
        "owned_by": "unbroken",
        "context_length": worker.context_length,
    }


async def _served(request: Request) -> list[dict[str, Any]]:
    services: Services = request.app.state.services
    services.auth.owner(request)
    try:
        return [_model(worker) for worker in await services.models.ready()]
    except UnbrokenError as error:
        if error.code == "model_not_ready":
            return []
        raise


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the models that live workers serve."""
    return {"object": "list", "data": await _served(request)}


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, request: Request) -> dict[str, Any]:
    """Describe one model; its id may contain slashes."""
    for served in await _served(request):
        if served["id"] == model_id:
            return served
    raise UnbrokenError("model_not_found", "No worker serves this model.", "model")
