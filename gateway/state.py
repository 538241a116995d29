"""What every route shares: the gateway's services, made once by the composition root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.admission import ReadyModels
    from gateway.auth import Authenticator
    from gateway.relay import Relay
    from shared.queue import SessionQueue
    from shared.session_log import SessionLog
    from shared.settings import GatewaySettings
    from shared.store import Store


@dataclass(frozen=True)
class Services:
    """The parts that routes use; kept as `app.state.services`."""

    settings: GatewaySettings
    store: Store
    auth: Authenticator
    log: SessionLog
    queue: SessionQueue
    relay: Relay
    models: ReadyModels
