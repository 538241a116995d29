"""Sessions beside their chat: cancel one, look at one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from gateway.chat import NOT_FOUND, owned_record
from gateway.render import usage_json
from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from gateway.state import Services

log = logging.getLogger("unbroken.sessions")
router = APIRouter()


@router.post("/v1/cancel/{session_id}")
async def cancel(session_id: str, request: Request) -> dict[str, str]:
    """Cancel a session, queued or running, from any gateway; repeating it changes nothing."""
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    status = await services.queue.cancel(session_id, owner, "requested")
    if status == "missing":
        raise UnbrokenError("session_not_found", NOT_FOUND, "session_id")
    log.info("cancel requested", extra={"session": session_id, "status": status})
    return {"session_id": session_id, "status": status}


@router.get("/v1/sessions/{session_id}")
async def session(session_id: str, request: Request) -> dict[str, Any]:
    """Tell a session's status, times (Unix seconds), usage, last index and place in the queue."""
    services: Services = request.app.state.services
    record = await owned_record(services, session_id, services.auth.owner(request))
    waits = record.status == "queued"
    return {
        "session_id": session_id,
        "object": "session",
        "status": record.status,
        "model": record.model,
        "created": record.created,
        "started": record.started,
        "ended": record.ended,
        "last_index": record.last,
        "queue_position": await services.queue.position(session_id) if waits else None,
        "usage": usage_json(record.usage) if record.usage else None,
    }
