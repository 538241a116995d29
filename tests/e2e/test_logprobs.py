"""Log probabilities through the official SDK, and over a worker's death."""

import json
import os
import signal

import pytest
import redis
from openai import OpenAI

from shared import keys

ASKED = {"model": "any", "logprobs": True, "seed": 3, "temperature": 1.0}
TEXT = [{"role": "user", "content": "Hello!"}]


def sdk(url: str) -> OpenAI:
    return OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def entries(choice) -> list:
    """All of a choice's entries: those of its thoughts, and those of its answer."""
    extra = (choice.logprobs.model_extra or {}).get("reasoning_content") or []
    return [*extra, *(entry.model_dump() for entry in choice.logprobs.content)]


def spelled(found) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in found).decode(errors="replace")


def test_a_response_s_answer_has_them_streamed_and_whole(stack):
    """Included, they spell the message's text; the deltas' are those of the end, without bytes."""
    request = {"model": "any", "input": "Hello!", "max_output_tokens": 12, "top_logprobs": 3}
    request |= {"include": ["message.output_text.logprobs"], "reasoning": {"effort": "none"}}
    request |= {"extra_body": {"seed": 3, "ignore_eos": True}}
    with sdk(stack.url) as client:
        whole = client.responses.create(**request)
        events = list(client.responses.create(**request, stream=True))
        plain = client.responses.create(**{**request, "include": None})
    [part] = next(item for item in whole.output if item.type == "message").content
    found = [entry.model_dump() for entry in part.logprobs]
    assert spelled(found) == part.text
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3 for entry in found)
    assert (whole.top_logprobs, plain.top_logprobs) == (3, 3)
    told = [
        (entry.token, entry.logprob, [other.logprob for other in entry.top_logprobs])
        for event in events
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert told == [
        (e["token"], e["logprob"], [o["logprob"] for o in e["top_logprobs"]]) for e in found
    ]
    message = next(item for item in plain.output if item.type == "message")
    assert message.content[0].logprobs == []


def test_strict_validation_streamed_whole_and_for_each_choice(stack):
    """The SDK takes them; streamed ones add up to the whole answer; each choice has its own."""
    request = {**ASKED, "messages": TEXT, "max_tokens": 12, "n": 2, "top_logprobs": 4}
    with sdk(stack.url) as client:
        whole = client.chat.completions.create(**request)
        streamed = {0: [], 1: []}
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                if choice.logprobs:
                    streamed[choice.index] += entries(choice)
        with client.chat.completions.stream(**request) as stream:
            for _event in stream:
                pass
            joined = stream.current_completion_snapshot
        plain = client.chat.completions.create(**{**request, "logprobs": None, "top_logprobs": 0})
    for choice in whole.choices:
        found = entries(choice)
        assert found
        text = (choice.message.model_extra["reasoning"] or "") + (choice.message.content or "")
        assert spelled(found) == text
        assert streamed[choice.index] == found
        assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 4 for entry in found)
        ranks = [[other["logprob"] for other in entry["top_logprobs"]] for entry in found]
        assert ranks == [sorted(rank, reverse=True) for rank in ranks]
        assert joined.choices[choice.index].logprobs.content == choice.logprobs.content
    assert entries(whole.choices[0]) != entries(whole.choices[1])
    assert [choice.logprobs for choice in plain.choices] == [None, None]


@pytest.mark.timeout(180)
def test_none_is_lost_or_repeated_when_the_worker_dies(make_stack):
    """Of a stream that two workers made, each token is told once, as in an undisturbed answer."""
    stack = make_stack(workers=2, env={"MAX_STEPS_PER_SECOND": "40"})
    stack.wait_until_ready()
    request = {**ASKED, "messages": TEXT, "max_tokens": 60, "top_logprobs": 2}
    request["extra_body"] = {"ignore_eos": True}
    found, name = [], ""
    with sdk(stack.url) as client:
        for chunk in client.chat.completions.create(**request, stream=True):
            choice = chunk.choices[0]
            if choice.logprobs:
                found += entries(choice)
            if len(found) >= 10 and not name:
                name = client.get(f"../v1/sessions/{chunk.id}", cast_to=dict)["worker"]
                with redis.Redis.from_url(stack.redis_url) as store:
                    pid = json.loads(store.get(keys.worker(name)))["pid"]
                os.kill(pid, signal.SIGKILL)
        session = client.get(f"../v1/sessions/{chunk.id}", cast_to=dict)
        whole = client.chat.completions.create(**request)
    assert session["worker"] != name
    truth = entries(whole.choices[0])
    assert [entry["token"] for entry in found] == [entry["token"] for entry in truth]
    values = [entry["logprob"] for entry in found]
    assert values == pytest.approx([entry["logprob"] for entry in truth], abs=2e-6)
