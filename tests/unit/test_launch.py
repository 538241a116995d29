"""Children that are forked from a process which has imported what they need, and how they end."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.stack import alive, wait_until
from worker import engine_process, launch
from worker.child import ChildDied, ChildPool, StartFailed
from worker.engine.channel import Channel
from worker.engine.messages import EngineConfig
from worker.engine_process import EngineProcess

ROOT = Path(__file__).parents[2]
HERE = "tests.unit.test_launch"

pytestmark = pytest.mark.skipif(not launch.forks(), reason="forks on Linux alone")


def import_nothing():
    """Be ready at once."""


def import_for_ever():
    """Stand for a template that is busy with its imports."""
    time.sleep(60)


def fail_to_import():
    """Stand for a library that fails to load, just now, and leaves half of itself behind."""
    sys.modules["colorsys"] = None
    raise RuntimeError


def report(sock, *args):
    """Tell what a child was given, whose child it is, and wait to be told to end."""
    channel = Channel(sock)
    channel.send((args, os.getppid()))
    word = channel.receive()
    if word == "fail":
        raise KeyError


def report_import(sock):
    """Tell, having imported what could not be imported before, whose child this is, and wait."""
    import colorsys

    channel = Channel(sock)
    channel.send((colorsys.__name__, os.getppid()))
    channel.receive()


def report_template(sock):
    """Tell how many threads the template has, and what it has done to torch."""
    import torch

    threads = psutil.Process(os.getppid()).num_threads()
    loaded = [name in sys.modules for name in ("torchvision", "transformers.generation.utils")]
    Channel(sock).send((threads, loaded, torch.cuda.is_initialized()))


def told(process):
    """Wait until the template has told the id of a child, which may speak before."""
    return wait_until(lambda: process.pid, "the template tells its id")


@pytest.fixture
def template():
    """A template whose imports take no time."""
    template = launch.Template("WARNING", f"{HERE}:import_nothing")
    yield template
    template.close()


@pytest.mark.parametrize(
    ("word", "code"), [("end", 0), ("fail", 1), (signal.SIGTERM, -signal.SIGTERM)]
)
@pytest.mark.parametrize("how", ["forked", "executed"])
def test_a_child_gets_its_arguments_and_leaves_a_code(template, how, word, code, capfd) -> None:
    """It is the same whether it was forked or has an interpreter of its own."""
    start = template.launch if how == "forked" else launch.execute
    sock, process = start(f"{HERE}:report", ("a", {"b": 1}))
    with sock:
        channel = Channel(sock)
        args, parent = channel.receive()
        assert args == ("a", {"b": 1})
        assert (parent == os.getpid()) == (how == "executed")
        assert process.poll() is None
        told(process)
        if isinstance(word, str):
            channel.send(word)
        else:
            process.terminate()
        assert process.wait(20) == process.returncode == code
        assert not alive(process.pid)


def test_a_child_that_is_killed_while_the_template_imports_is_gone_at_once() -> None:
    """Nobody waits for imports to end what has not begun; closing ends the template too."""
    before = psutil.Process().children()
    template = launch.Template("WARNING", f"{HERE}:import_for_ever")
    sock, process = template.launch(f"{HERE}:report", ())
    [busy] = set(psutil.Process().children()) - set(before)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(0) == -signal.SIGKILL
    template.close()
    sock.close()
    assert not busy.is_running()


@pytest.fixture
def busy_template():
    """A template whose imports do not end."""
    template = launch.Template("WARNING", f"{HERE}:import_for_ever")
    yield template
    template.close()


async def test_closing_a_pool_does_not_wait_for_imports(busy_template) -> None:
    """The thread that reads the answer of a child that will never begin is let go."""
    pool = ChildPool("tests.unit.test_child:create", launch=busy_template.launch)
    starting = asyncio.create_task(pool.start())
    while not pool._slots or pool._slots[0].child is None:
        await asyncio.sleep(0)
    await asyncio.wait_for(pool.close(), 20)
    with pytest.raises(ChildDied):
        await starting


async def test_a_pool_gives_up_a_child_that_does_not_begin(busy_template) -> None:
    """The time a child may take to start counts the template's imports."""
    pool = ChildPool("tests.unit.test_child:create", launch=busy_template.launch, start_timeout=0.1)
    with pytest.raises(StartFailed):
        await asyncio.wait_for(pool.start(), 20)
    await asyncio.wait_for(pool.close(), 20)


async def test_an_engine_that_is_not_forked_yet_ends_at_once(busy_template, monkeypatch) -> None:
    """Whoever watches its socket hears of its end, and closing waits for no imports."""
    monkeypatch.setattr(engine_process, "STOP_SECONDS", 60)
    engine = EngineProcess(
        EngineConfig("m", None, "cpu", "auto", False, 1, 64, 1), busy_template.launch
    )
    ended = asyncio.Event()
    engine.watch(lambda _: ended.set())
    engine.kill()
    await asyncio.wait_for(ended.wait(), 20)
    await asyncio.wait_for(engine.end(), 20)


def test_with_a_killed_template_its_children_end_and_the_next_gets_another(template) -> None:
    """The children's owner sees them killed, and may start them anew."""
    first, process = template.launch(f"{HERE}:report", ())
    _, parent = Channel(first).receive()
    told(process)
    os.kill(parent, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    wait_until(lambda: not alive(process.pid), "the child ends")
    second, another = template.launch(f"{HERE}:report", ())
    assert Channel(second).receive()[1] != parent
    for sock in (first, second):
        sock.close()
    assert another.poll() is None or another.returncode == 1  # its socket's end is its own


def test_a_failed_import_fails_no_child_that_can_do_it(capfd) -> None:
    """It may have failed for a moment, so children are spared what is left of it."""
    template = launch.Template("WARNING", f"{HERE}:fail_to_import")
    for _ in range(2):
        sock, process = template.launch(f"{HERE}:report_import", ())
        with sock:
            name, parent = Channel(sock).receive()
            assert (name, parent != os.getpid()) == ("colorsys", True)
            told(process)
            process.terminate()
            assert process.wait(20) == -signal.SIGTERM
    assert capfd.readouterr().err.count("imports failed") == 1
    sock, process = template.launch(f"{HERE}:report_import", ())
    with sock:
        Channel(sock).receive()
        told(process)
        template.close()
        wait_until(lambda: not alive(process.pid), "the child ends")


PARENT = f"""
import time
from worker.engine.channel import Channel
from worker.launch import Template
sock, process = Template("WARNING", "{HERE}:import_nothing").launch("{HERE}:report", ())
template = Channel(sock).receive()[1]
while process.pid is None:
    time.sleep(0.01)
print(process.pid, template, flush=True)
Channel(sock).receive()
"""


def test_template_and_children_end_with_a_killed_parent() -> None:
    """Nothing is left of a worker that is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    wait_until(lambda: not any(map(alive, pids)), "template and child end")


@pytest.mark.timeout(120)
def test_the_template_has_one_thread_and_has_begun_no_device() -> None:
    """So a fork tears nothing apart: no lock is held by a thread that the child does not have."""
    template = launch.Template()
    sock, process = template.launch(f"{HERE}:report_template", ())
    with sock:
        threads, loaded, cuda = Channel(sock).receive()
    assert process.wait(20) == 0
    template.close()
    assert (threads, loaded, cuda) == (1, [True, True], False)


@pytest.mark.parametrize("device", ["cuda", "hip", "xpu"])
def test_an_engine_on_a_device_is_not_forked(template, tmp_path, monkeypatch, device) -> None:
    """A driver does not survive a fork; the prompt processor computes on the CPU everywhere."""
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    (tmp_path / "version.py").write_text("cuda = None\nhip = None\n")
    assert launch.for_engine(template) == template.launch
    (tmp_path / "version.py").write_text(f"{device} = '12.8'\n")
    assert launch.for_engine(template) is launch.execute
    assert launch.for_processor(template) == template.launch


def test_arguments_do_not_stand_on_the_command_line(template) -> None:
    """They may hold a token, and everybody on a machine may read command lines."""
    for start in (template.launch, launch.execute):
        sock, process = start(f"{HERE}:report", ("hf_secret",))
        with sock:
            assert Channel(sock).receive()[0] == ("hf_secret",)
            told(process)
            assert "hf_secret" not in " ".join(psutil.Process(process.pid).cmdline())
        process.wait(20)
