"""The page at `/`, the status it shows, and the kill buttons that it has under `run.py`."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from gateway.admission import read_body
from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from gateway.state import Services
    from shared.fleet import WorkerInfo

log = logging.getLogger("unbroken.page")
router = APIRouter()

GATEWAY_ID = secrets.token_hex(3)
"""Names this process; a restarted gateway is another one."""

FOLDER = Path(__file__).with_name("static")
FILES = {
    "app.css": "text/css",
    "app.js": "text/javascript",
    "markdown.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "cache-control": "no-cache",  # with an etag: a reload after an update shows the new page
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
LOOPBACK = {"127.0.0.1", "::1"}
LOOPBACK_NAMES = {"127.0.0.1", "localhost", "[::1]"}
KILL_SECONDS = 5.0  # how long a kill's body may take to come
CONTROL_HEADER = "x-unbroken-control"  # bears the token that `run.py` prints at its start
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


class Fault(msgspec.Struct):
    """What shall die: a worker of this id, this gateway, or Redis."""

    part: Literal["worker", "gateway", "redis"]
    worker: str = ""


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Serve the page."""
    return FileResponse(FOLDER / "index.html", media_type="text/html", headers=HEADERS)


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    """Serve the page's style and script."""
    if name not in FILES:
        raise UnbrokenError("not_found", "Not Found")
    return FileResponse(FOLDER / name, media_type=FILES[name], headers=HEADERS)


@router.get("/v1/status")
async def status(request: Request) -> dict[str, Any]:
    """Tell which workers live and how busy they are, and which gateway says so."""
    services: Services = request.app.state.services
    services.auth.owner(request)
    workers = await services.models.workers()
    return {
        "object": "status",
        "gateway": GATEWAY_ID,
        "workers": [_told(worker) for worker in workers],
        "queue_depth": await services.queue.depth(),
        "sessions_running": sum(worker.running for worker in workers),
        "controls": _controls(request) is not None,
        "defaults": {
            "max_tokens": services.settings.max_tokens,
            "temperature": services.settings.temperature,
        },
    }


def _told(worker: WorkerInfo) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(worker)
    del fields["pid"], fields["fingerprint"]
    return fields


@router.post("/demo/kill", include_in_schema=False)
async def kill(request: Request) -> Response:
    """Kill a part of the stack that `run.py` runs on this machine."""
    services: Services = request.app.state.services
    services.auth.owner(request)
    state = _controls(request)
    foreign = request.headers.get("origin", "").partition("://")[2] not in (
        "",
        request.headers.get("host"),
    )
    if state is None or foreign:
        raise UnbrokenError("not_found", "Not Found")
    try:
        fault = msgspec.json.decode(await read_body(request, 1024, KILL_SECONDS), type=Fault)
    except msgspec.DecodeError as error:
        raise UnbrokenError("invalid_value", str(error)) from None
    pid = _victim(state, fault, await services.models.workers())
    log.warning("killed by a visitor", extra={"part": fault.part, "pid": pid})
    # Redis is asked to end, and starts again from its log; the others get no chance to tidy up.
    os.kill(pid, signal.SIGTERM if fault.part == "redis" else signal.SIGKILL)
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _controls(request: Request) -> dict[str, Any] | None:
    """Return what `run.py` wrote down, for a caller on this machine with its token; else None."""
    services: Services = request.app.state.services
    path = services.settings.run_state_path
    given = request.headers.get(CONTROL_HEADER, "")
    if not (path and given and _is_direct(request)):
        return None
    try:
        state: dict[str, Any] = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    wanted = str(state.get("control") or "")
    right = wanted and secrets.compare_digest(given.encode(), wanted.encode())
    return state if right else None


def _is_direct(request: Request) -> bool:
    """Tell whether a caller is on this machine, as far as can be seen.

    The token is what guards. This is a second fence: the name stops foreign names that resolve to
    loopback, the headers a proxy on this machine that serves others and has learnt the token.
    """
    host = request.headers.get("host", "")
    local = request.client is not None and request.client.host in LOOPBACK
    named = (host.rpartition(":")[0] or host) in LOOPBACK_NAMES
    return local and named and not any(name in request.headers for name in FORWARDED)


def _victim(state: dict[str, Any], fault: Fault, workers: list[WorkerInfo]) -> int:
    """Return the pid of what shall die.

    Raises:
        UnbrokenError: `invalid_value`, where `run.py` does not run it.
    """
    if fault.part == "gateway":
        return os.getpid()
    if fault.part == "redis":
        pids = [state["redis"]["pid"]]
    else:
        named = {worker.pid for worker in workers if worker.id == fault.worker}
        pids = [worker["pid"] for worker in state["workers"] if worker["pid"] in named]
    if not pids or not pids[0]:
        raise UnbrokenError("invalid_value", f"No such {fault.part} runs here.", "worker")
    return int(pids[0])
