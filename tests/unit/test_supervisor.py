"""The supervisor starts Redis again on its data, and gives parts the time that they may drain."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import redis

import run
import supervisor
from supervisor import Stack

SLOW_TO_STOP = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep({seconds})
    pathlib.Path("finished").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("runs").touch()
signal.pause()
"""


@pytest.mark.parametrize(("drain", "finishes"), [(5.0, True), (0.0, False)])
def test_a_part_has_its_drain_time_before_it_is_killed(tmp_path, monkeypatch, drain, finishes):
    """A worker that takes a second to finish gets it where the settings allow it to drain."""
    monkeypatch.setattr(supervisor, "GRACE", 0.2)
    stack = Stack(tmp_path / "data", "redis://elsewhere", drain)
    argv = [sys.executable, "-c", SLOW_TO_STOP.format(seconds=1)]
    stack.add("worker", argv, {}, tmp_path)
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    stack.stop()
    assert (tmp_path / "finished").exists() == finishes
    assert not stack.of("worker")[0].runs()


def test_a_killed_redis_comes_back_with_what_it_had(tmp_path):
    """It is started at the same address, on the same folder, and reads its append-only file."""
    stack = Stack(tmp_path / "data", "")
    try:
        run.start_redis(stack, sys.executable)
        [part] = stack.of("redis")
        with redis.Redis.from_url(stack.redis_url) as client:
            client.config_set("appendfsync", "always")  # else a last write may wait for an fsync
            client.set("kept", "yes", ex=600)
            client.incr("count")
            os.kill(killed := part.pid, signal.SIGKILL)
            while part.pid == killed or not answers(client):
                stack.tend()
            assert (client.get("kept"), client.get("count")) == (b"yes", b"1")
    finally:
        stack.stop()


def answers(client):
    try:
        return client.ping()
    except redis.RedisError:  # it is being started, or loading
        return False
