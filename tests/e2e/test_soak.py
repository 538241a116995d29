"""A short soak: random requests of all kinds, each of which ends as it must."""

from benchmarks import soak
from benchmarks._soak_requests import KINDS

REQUESTS = 40


async def test_random_requests_end_as_they_must_and_leave_nothing(stack):
    """Text, images, cancels, leavers and bad media: nothing runs on, and no process ends."""
    found = await soak.run([stack.url], stack.process.pid, REQUESTS, clients=8, seed=5)
    assert found.wrong == []
    assert found.left_over == ""
    watched = {name.split()[0] for name in found.memory}
    assert {"gateway", "worker", "engine", "redis"} <= watched
    assert len(found.kinds) >= len(KINDS) - 2


def test_a_process_that_grows_is_named():
    """What grows by more than the limit is told apart from what breathes."""
    seen = soak.Soak()
    for number in range(100):
        seen.memory["flat"].append(100.0 + number % 7)
        seen.memory["leaks"].append(100.0 + number)
    assert seen.grown() == ["leaks"]
    assert not seen.is_clean
