"""Asks the gateway of this container how it is: `python -m gateway.healthcheck [--end-hung]`.

Needs the standard library alone, since it starts every few seconds.
"""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path

from shared import hung

ADDRESS = "127.0.0.1:3000"
TIMEOUT_SECONDS = 3.0
STRIKES_FILE = Path("/tmp/gateway.hangs")  # noqa: S108 - a container's own
HANGS = "broken: it hangs"


def check(address: str, *, need_ready: bool = False) -> tuple[int, str]:
    """Return an exit code and a sentence.

    The code is 0 if the process answers: without Redis or a worker it still says so to whoever
    asks, and another one could do no better. With `need_ready` it is 0 if requests can be served.
    """
    try:
        _, body = _get(address, "/health")
        if body.get("status") != "ok":
            return 1, f"broken: {address} is no gateway"
        status, body = _ready(address)
    except TimeoutError:
        return 1, f"{HANGS}, no answer from {address} within {TIMEOUT_SECONDS:g} s"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return 1, f"broken: no answer from {address} ({error})"
    if status == http.client.OK:
        return 0, f"ready: {body['workers']} workers, {body['queue_depth']} sessions wait"
    said = body.get("error")
    why = said.get("message") if isinstance(said, dict) else f"HTTP {status}"
    return int(need_ready), f"starting: {why}"


def _ready(address: str) -> tuple[int, dict[str, object]]:
    """Ask `/ready`; it may wait for Redis for longer than this command does."""
    try:
        return _get(address, "/ready")
    except TimeoutError:
        return 503, {"error": {"message": "Redis takes its time."}}


def _get(address: str, path: str) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        return answer.status, body if isinstance(body, dict) else {}
    finally:
        connection.close()


def main(arguments: list[str]) -> int:
    """Print the sentence; return the exit code.

    With `--end-hung`, a gateway that accepts connections and answers none is killed with the third
    call in a row.
    """
    addresses = [argument for argument in arguments if not argument.startswith("-")]
    code, sentence = check(*addresses or [ADDRESS], need_ready="--ready" in arguments)
    if "--end-hung" in arguments:
        hung.judge(STRIKES_FILE, "gateway.main", hangs=sentence.startswith(HANGS))
    print(sentence)  # noqa: T201 - its answer
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
