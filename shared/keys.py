"""Every Redis key and channel name, and how long keys live."""

from __future__ import annotations

from arq.constants import job_key_prefix, retry_key_prefix

SESSION = "unbroken:session:"
EVENTS = "unbroken:events:"
REQUEST = "unbroken:request:"
WATCH = "unbroken:watch:"
CANCEL = "unbroken:cancel:"
DELETED = "unbroken:deleted:"
WORKER = "unbroken:worker:"
LEVELS = "unbroken:levels:"
LIVE = "unbroken:live:"
JOB = job_key_prefix
RETRY = retry_key_prefix

QUEUE = "unbroken:queue"
CONTACT = "unbroken:contact"
LEASES = "unbroken:leases"
WORKERS = "unbroken:workers"
OUTBOX = "unbroken:outbox"
SWEEP = "unbroken:sweep"
WORK_BELL = "unbroken:bell:work:"
EVENT_BELL = "unbroken:bell:events:"
LIFELINE = "unbroken:bell:life:"

LIVE_TTL = 24 * 3600
"""Seconds a queued or running session and the shared structures outlive their last touch."""

WORKER_TTL_MS = 5000
"""How long a worker counts as alive after its last word."""


def session(session_id: str) -> str:
    """Hash: the record of a session (owner, digest, status, lease, last index, …)."""
    return SESSION + session_id


def events(session_id: str) -> str:
    """Stream: the session's log; event n is entry `<n+1>-0`."""
    return EVENTS + session_id


def event_bell(session_id: str) -> str:
    """Channel: each message is an index and the events from there on, a line for each."""
    return EVENT_BELL + session_id


def request(session_id: str) -> str:
    """String: the queued `GenerationRequest`."""
    return REQUEST + session_id


def work_bell(model: str) -> str:
    """List of at most one ring: a session of this model waits for a worker."""
    return WORK_BELL + model


def job(session_id: str) -> str:
    """String: the arq job that runs the session, where arq's `run_job` looks for it."""
    return JOB + session_id


def watch(session_id: str) -> str:
    """String with a TTL: exists while somebody watches, and a while after."""
    return WATCH + session_id


def cancel(session_id: str) -> str:
    """String: the reason for which the running session shall be cancelled."""
    return CANCEL + session_id


def deleted(session_id: str) -> str:
    """String with a TTL: a session of this id was deleted; holds when that one was queued."""
    return DELETED + session_id


def levels(owner: str) -> str:
    """Hash: how much of its limits a key has used lately."""
    return LEVELS + owner


def live_sessions(owner: str) -> str:
    """Sorted set: the sessions of a key with limits that may still run, by their admission."""
    return LIVE + owner


def worker(worker_id: str) -> str:
    """String with a TTL: what a live worker says of itself."""
    return WORKER + worker_id


def lifeline(worker_id: str) -> str:
    """Channel: a worker is subscribed to it as long as its process lives; it carries nothing."""
    return LIFELINE + worker_id
