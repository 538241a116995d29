"""The relay's own connections over what `REDIS_URL` can name: TLS and a Unix socket."""

import asyncio
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import run
from shared import keys
from shared.store import Store, connect
from shared.tasks import stop
from tests.integration.test_redis_restart import read_stream
from tests.scripted import ScriptedWorker
from tests.served import serving
from worker.lifeline import Lifeline

CERTIFICATE = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
CERTIFICATE += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
CERTIFICATE += ["-keyout", "key.pem", "-out", "cert.pem"]
TLS = "tls-port {port}\ntls-cert-file cert.pem\ntls-key-file key.pem\n"
TLS += "tls-ca-cert-file cert.pem\ntls-auth-clients no\n"
COMMON = 'port 0\nrequirepass pw\nsave ""\n'


@pytest.fixture
def folder():
    """A folder whose name is short enough for a socket's."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(params=["rediss", "unix"])
def linked(request, folder):
    """The URL of a Redis that listens with TLS only, or on a Unix socket only."""
    port = run.free_port()
    if request.param == "rediss":
        if shutil.which("openssl") is None:
            pytest.skip("no openssl to make a certificate with")
        subprocess.run(CERTIFICATE, cwd=folder, check=True, capture_output=True)
        conf, url = TLS, f"rediss://:pw@127.0.0.1:{port}/2?ssl_ca_certs={folder}/cert.pem"
    else:
        conf, url = "unixsocket redis.sock\n", f"unix://:pw@{folder}/redis.sock?db=2"
    (folder / "redis.conf").write_text(COMMON + conf.format(port=port))
    argv = [run.find_redis(sys.executable), "redis.conf"]
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen(argv, cwd=folder, stdout=log, stderr=log)
    try:
        while b"eady to accept connections" not in (log := (folder / "redis.log").read_bytes()):
            if server.poll() is not None:
                assert b"tls" in log.lower(), log.decode()
                pytest.skip(f"{argv[0]} was built without TLS")
        yield url
    finally:
        server.kill()
        server.wait()


async def test_a_stream_over_such_a_connection_is_whole(linked):
    """Events come by rings and by the hub's reads; both connections are what the URL says."""
    store = Store(connect(linked))
    worker = ScriptedWorker(store)
    await worker.announce()
    async with serving(linked) as client:
        reading = asyncio.create_task(read_stream(str(client.base_url), "s"))
        claimed = await worker.next()
        for n in range(40):
            with pytest.MonkeyPatch.context() as patch:
                if n % 10 == 5:
                    patch.setattr(keys, "EVENT_BELL", "nobody:hears:")
                await worker.say(claimed, "long " * 3000 if n % 10 == 7 else f"{n} ")
        wires = client.services.relay._wires
        for name in ("bell", "hub"):
            link = wires[name]._transport
            if linked.startswith("rediss"):
                assert link.get_extra_info("cipher")
            else:
                assert link.get_extra_info("socket").family == socket.AF_UNIX
        await worker.finish(claimed)
        events = await reading
    ids = [event.split("\n")[0] for event in events if event.startswith("id:")]
    assert ids == [f"id: s:{n}" for n in range(42)]
    assert events[-1] == "data: [DONE]"
    await store.close()


async def test_a_lifeline_over_such_a_connection_is_held_and_made_anew(linked):
    """Each worker has one, which comes back after Redis has closed it."""
    store = Store(connect(linked))
    lifeline = Lifeline(store.redis, "w")
    running = asyncio.create_task(lifeline.run())
    for breaks in range(2):
        while (await store.redis.pubsub_numsub(keys.lifeline("w")))[0][1] == 0:
            await asyncio.sleep(0.01)
        assert lifeline.breaks == breaks
        await store.redis.client_kill_filter(_type="pubsub")
        while lifeline.breaks == breaks:
            await asyncio.sleep(0.01)
    await stop(running)
    await store.close()
