"""The documented Redis users are enough for gateway and worker, and for nothing more."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
import redis

import run
from shared import keys
from shared.fleet import Fleet
from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.stack import ROOT, clean_environment, wait_until

USERS = ROOT / "deploy" / "redis-users.acl"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def acl_redis(tmp_path):
    """A Redis with the documented users alone; URLs of the gateway's, the worker's, the admin's."""
    port = run.free_port()
    users = USERS.read_text().replace("CHANGE-ME-GATEWAY", "gg").replace("CHANGE-ME-WORKER", "ww")
    users = users.replace("CHANGE-ME-ADMIN", "aa")
    lines = [line for line in users.splitlines() if line.startswith("user ")]
    (tmp_path / "users.acl").write_text("\n".join(lines) + "\n")
    (tmp_path / "redis.conf").write_text(f"bind 127.0.0.1\nport {port}\naclfile users.acl\n")
    argv = [run.find_redis(sys.executable), "redis.conf"]
    with (tmp_path / "redis.log").open("wb") as log:
        server = subprocess.Popen(argv, cwd=tmp_path, stdout=log, stderr=log)
    urls = {n: f"redis://{n}:{n[0] * 2}@127.0.0.1:{port}/0" for n in ("gateway", "worker", "admin")}

    def answers():
        try:
            with redis.Redis.from_url(urls["admin"]) as client:
                return client.ping()
        except redis.exceptions.ConnectionError:
            return False

    try:
        wait_until(answers, (tmp_path / "redis.log").read_text())
        yield urls
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def worker(acl_redis, tmp_path, demo_model):
    env = {**clean_environment(), "REDIS_URL": acl_redis["worker"], "PERSIST_SESSIONS": "1"}
    env |= {"MODEL_REPO_ID": str(demo_model), "DRAIN_SECONDS": "1"}
    with (tmp_path / "worker.log").open("wb") as log:
        argv = [sys.executable, "-m", "worker.main"]
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log)
    yield process
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    process.wait(30)


def denied(admin):
    """What Redis refused to its users, as `user: command or key`."""
    return [f"{e['username']}: {e['object']}" for e in admin.acl_log()]


def test_the_stack_works_with_the_documented_users(acl_redis, worker, tmp_path):
    """Chats, resumes, cancels, limits, metrics and the archive need no more than the users have."""
    keyfile = tmp_path / "keys"
    keyfile.write_text('{"key": "k", "requests_per_minute": 90, "concurrent_sessions": 2}\n')
    env = {
        "PERSIST_SESSIONS": "1",
        "API_KEYS_FILE": str(keyfile),
        "SESSIONS_DB_PATH": str(tmp_path / "s.db"),
    }
    gateway = GatewayProcess(acl_redis["gateway"], tmp_path, env)
    headers = {"authorization": "Bearer k"}
    client = httpx.Client(base_url=gateway.url, timeout=30, trust_env=False, headers=headers)
    admin = redis.Redis.from_url(acl_redis["admin"], decode_responses=True)
    try:
        with client, admin:
            wait_until(lambda: client.get("/ready").status_code == 200, "ready", 150)
            whole = client.post("/v1/chat/completions", json=HELLO)
            assert whole.status_code == 200, whole.text
            sid = whole.json()["id"]
            place = {"last-event-id": f"{sid}:1"}
            assert "[DONE]" in client.get(f"/v1/sessions/{sid}/events", headers=place).text
            for body in (
                {**HELLO, "stream": True, "session_id": "a"},
                {**HELLO, "stream": True, "session_id": "a"},
            ):
                assert "[DONE]" in client.post("/v1/chat/completions", json=body).text
            long = {**HELLO, "stream": True, "session_id": "b", "max_tokens": 4000}
            with client.stream("POST", "/v1/chat/completions", json=long) as stream:
                lines = stream.iter_lines()
                while "id: b:2" not in next(lines):
                    pass
                assert client.post("/v1/cancel/b").status_code == 200
                assert "data: [DONE]" in list(lines)
            assert client.get("/v1/sessions/b").json()["status"] == "cancelled"
            answer = client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 16})
            assert client.delete(f"/v1/responses/{answer.json()['id']}").status_code == 200
            assert "unbroken_redis_up 1.0" in client.get("/metrics").text
            wait_until(lambda: "archived" in gateway._log.read_text(), "the archive")
            worker.terminate()
            worker.wait(30)
            assert denied(admin) == []
            refused(acl_redis)
            assert len(denied(admin)) >= 8
    finally:
        gateway.stop()


async def test_a_worker_may_bury_another_with_the_documented_users(acl_redis):
    """A dead worker's leases are ended, and its sessions' bell is rung, by another worker."""
    store = Store(connect(acl_redis["worker"]))
    try:
        await store.redis.hset(keys.session("s"), mapping={"lease": "dead:1", "model": "m"})
        await store.redis.zadd(keys.LEASES, {"s": time.time() * 1000 + 60_000})
        assert await Fleet(store).lifelines(["dead"]) == ([], set())
        assert await Fleet(store).bury("dead") == 1
        assert await store.redis.llen(keys.work_bell("m")) == 1
    finally:
        await store.close()
    with redis.Redis.from_url(acl_redis["admin"], decode_responses=True) as admin:
        assert denied(admin) == []


def refused(urls):
    """Each user is refused what is not its business."""
    for name in ("gateway", "worker"):
        with redis.Redis.from_url(urls[name]) as client:
            for command in (
                ["FLUSHALL"],
                ["KEYS", "*"],
                ["CONFIG", "GET", "*"],
                ["SET", "other", "1"],
                ["GET", "other"],
                ["PUBLISH", "other", "1"],
                ["ACL", "LIST"],
                ["CLIENT", "LIST"],
                ["SCRIPT", "FLUSH"],
            ):
                with pytest.raises(redis.exceptions.ResponseError, match="permission"):
                    client.execute_command(*command)
    with (
        redis.Redis.from_url(urls["worker"]) as client,
        pytest.raises(redis.exceptions.ResponseError, match="permission"),
    ):
        client.hset("unbroken:levels:x", "requests", 0)
