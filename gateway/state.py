"""What every route shares: the gateway's services, made once by the composition root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.admission import ReadyModels
    from gateway.auth import Authenticator
    from gateway.drain import Drain
    from gateway.history import History
    from gateway.limits import RateLimits
    from gateway.meter import Probe
    from gateway.relay import Relay
    from gateway.upkeep import Upkeep
    from shared.presence import Presence
    from shared.queue import SessionQueue
    from shared.settings import GatewaySettings
    from shared.store import Store


@dataclass(frozen=True)
class Services:
    """The parts that routes use; kept as `app.state.services`."""

    settings: GatewaySettings
    store: Store
    auth: Authenticator
    log: History
    presence: Presence
    queue: SessionQueue
    relay: Relay
    models: ReadyModels
    upkeep: Upkeep
    drain: Drain
    probe: Probe
    limits: RateLimits
