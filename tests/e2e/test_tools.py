"""Calls of functions and answers in a format, through the SDKs, against a whole stack."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from shared.fleet import Fleet
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.client_kit import output_of
from tests.conftest import TEST_ENV
from tests.random_schemas import a_schema
from tests.stack import Stack, clean_environment, wait_until

pytestmark = pytest.mark.timeout(400)  # two workers start, and one again: slow on a busy machine

SCHEMA = {
    "type": "object",
    "properties": {"at": {"type": "string", "maxLength": 8}, "how": {"enum": ["near", "far"]}},
    "required": ["at", "how"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now", "strict": True}}
ASK = [{"role": "user", "content": "Look at the sea."}]
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "it", "schema": SCHEMA, "strict": True},
}
BASE = {"model": "any", "messages": ASK, "max_tokens": 200, "reasoning_effort": "none"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory, demo_model):
    """A gateway and two workers; the last test kills one."""
    folder = tmp_path_factory.mktemp("tools") / "data"
    with Stack(folder, workers=2, env={**TEST_ENV, "MAX_STEPS_PER_SECOND": "60"}) as running:
        yield running


XML = (
    "<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>"
)
XML_CALLS = """{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\n<function=' + call.function.name + '>\n' -}}
{%- for name, value in call.function.arguments | items -%}
{{- '<parameter=' + name + '>\n' + (value if value is string else value | tojson) -}}
{{- '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}"""


@pytest.fixture(scope="module")
def xml_stack(tmp_path_factory, demo_model):
    """A gateway and two workers, whose model's chat template has a tag for each parameter."""
    folder = tmp_path_factory.mktemp("xml")
    shutil.copytree(demo_model, folder / "model")
    template = folder / "model" / "chat_template.jinja"
    before, _, rest = template.read_text().partition('<tool_call>\n{"name": ..., ')
    middle, _, rest = rest.partition("</tool_call>")[2].partition("{%- for call in message.tool_c")
    behind = rest.partition("{%- endfor -%}")[2]
    template.write_text(f"{before}{XML}{middle}{XML_CALLS}{behind}")
    env = {**TEST_ENV, "MAX_STEPS_PER_SECOND": "60"}
    with Stack(folder / "data", workers=2, model=str(folder / "model"), env=env) as running:
        yield running


@pytest.fixture
def client(stack):
    with OpenAI(
        base_url=f"{stack.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


class Look(BaseModel):
    """What `parse` makes a schema of."""

    model_config = ConfigDict(extra="forbid")
    at: str = Field(max_length=8)
    far: bool


def test_a_call_passes_strict_validation_and_its_answer_goes_back(client):
    """Streamed and whole, a required call is the same; the next turn takes it and its result."""
    request = BASE | {"tools": [LOOK, NOW], "tool_choice": "required", "seed": 4}
    request["parallel_tool_calls"] = False
    whole = client.chat.completions.create(**request).choices[0]
    with client.chat.completions.stream(**request) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    [call], [again] = whole.message.tool_calls, final.message.tool_calls
    assert (whole.finish_reason, final.finish_reason) == ("tool_calls", "tool_calls")
    assert (call.function.name, call.function.arguments) == (
        again.function.name,
        again.function.arguments,
    )
    assert whole.message.content is None
    deltas = [e.chunk.choices[0].delta.tool_calls for e in events if e.type == "chunk"]
    first, *more = [delta[0] for delta in deltas if delta]
    assert (first.id, first.type, first.function.name) == (again.id, "function", call.function.name)
    assert all((part.id, part.function.name) == (None, None) for part in more)
    result = {"role": "tool", "tool_call_id": call.id, "content": "waves"}
    turn = [*ASK, whole.message.model_dump(exclude_none=True), result]
    longer = client.chat.completions.create(**BASE | {"messages": turn, "tools": [LOOK, NOW]})
    plain = client.chat.completions.create(**BASE | {"tools": [LOOK, NOW]})
    assert longer.usage.prompt_tokens > plain.usage.prompt_tokens + 20


def test_a_format_is_followed_by_every_choice_and_behind_a_thought(client):
    """`parse` gives an object; so does each of three choices that have thought before."""
    parsed = client.chat.completions.parse(**BASE, response_format=Look)
    assert isinstance(parsed.choices[0].message.parsed, Look)
    fields = {"reasoning_effort": None, "extra_body": {"thinking_token_budget": 7}}
    answer = client.chat.completions.create(**BASE | fields, response_format=FORMAT, n=3)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.message.reasoning
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 3 * 8


def test_a_strict_function_is_followed_where_the_model_need_not_call(client, demo_model):
    """With `auto`, a model that is made to open calls writes them by the schema."""
    added = json.loads((demo_model / "tokenizer.json").read_text())["added_tokens"]
    [tag] = [token["id"] for token in added if token["content"] == "<tool_call>"]
    request = BASE | {"tools": [LOOK], "logit_bias": {str(tag): 12}, "temperature": 1.0}
    whole = []
    for seed in range(4):
        made, reason = {}, None
        for chunk in client.chat.completions.create(**request | {"seed": seed}, stream=True):
            reason = chunk.choices[0].finish_reason or reason
            for part in chunk.choices[0].delta.tool_calls or ():
                made[part.index] = made.get(part.index, "") + (part.function.arguments or "")
        whole += list(made.values())[: None if reason == "tool_calls" else -1]
    assert whole
    for arguments in whole:
        jsonschema.validate(json.loads(arguments), SCHEMA)


def test_two_hundred_random_formats_are_followed_side_by_side(client):
    """32 at a time, streamed and whole, with a thought and without: each document validates."""

    def ask(number):
        draw = random.Random(number)
        schema = a_schema(draw)
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        words = " ".join(
            draw.choices(["sea", "red", "count", "to", "why", "12"], k=draw.randint(1, 9))
        )
        request = BASE | {"messages": [{"role": "user", "content": words}], "max_tokens": 900}
        request |= {
            "response_format": form,
            "seed": number,
            "temperature": draw.choice([0, 0.7, 1.5]),
        }
        if number % 4 < 2:
            request |= {"reasoning_effort": None, "extra_body": {"thinking_token_budget": 6}}
        if number % 2:
            with client.chat.completions.stream(**request) as stream:
                choice = stream.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**request).choices[0]
        if choice.finish_reason != "stop":
            return schema
        jsonschema.validate(json.loads(choice.message.content), schema)
        return None

    with ThreadPoolExecutor(32) as threads:
        assert [cut for cut in threads.map(ask, range(200)) if cut] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {}},
        {"type": "strange"},
        {"$ref": "#"},
        {"type": "string", "pattern": "((("},
        {"allOf": [{"type": "string", "pattern": f".*[a-m].{{{i}}}x.*"} for i in range(30)]},
        {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(3000)]},
    ],
    ids=["not", "type", "endless", "pattern", "hang", "large"],
)
def test_what_cannot_be_followed_is_a_400_in_time(client, schema):
    """The answer names the field, comes within seconds, and the next request is served."""
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    began = time.monotonic()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**BASE | {"response_format": form})
    assert time.monotonic() - began < 40
    assert caught.value.param.startswith("response_format")
    assert client.chat.completions.create(**BASE | {"max_tokens": 2}).usage.completion_tokens == 2


@pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed")
@pytest.mark.parametrize("name", ["openai", "ai", "langchain"])
async def test_clients_in_javascript_get_calls_and_objects(js, stack, name):
    """openai-node, the Vercel AI SDK and LangChain.js read a streamed call and an object."""
    job = json.dumps({"client": name, "url": stack.url, "schema": SCHEMA})
    got = json.loads(await output_of("node", "tools.mjs", job, cwd=js, env=clean_environment()))
    assert "error" not in got, got
    assert got["call"]["name"] == "look"
    assert got["call"]["id"].startswith("call_")
    assert got["reason"] in ("tool_calls", "tool-calls")
    jsonschema.validate(got["call"]["input"], SCHEMA)
    jsonschema.validate(got["object"], SCHEMA)


def test_a_constrained_answer_survives_its_worker(stack, client):
    """Killed in the middle of an object and of a call, both come out as if nothing had happened."""
    schema = {"type": "array", "items": SCHEMA, "minItems": 5, "maxItems": 5}
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    function = {"name": "look", "parameters": {"type": "object", "properties": {"all": schema}}}
    function["parameters"] |= {"required": ["all"], "additionalProperties": False}
    named = {"type": "function", "function": {"name": "look"}}
    asked = [
        {"response_format": form},
        {"tools": [{"type": "function", "function": function}], "tool_choice": named},
    ]
    fields = {"reasoning_effort": None, "extra_body": {"thinking_token_budget": 4}}
    for kind in asked:
        request = BASE | fields | kind | {"seed": 11, "max_tokens": 400}
        calm = client.chat.completions.create(**request).choices[0]
        stream = client.chat.completions.create(**request, stream=True)
        text, worker, reason = "", None, None
        for number, chunk in enumerate(stream):
            delta = chunk.choices[0].delta
            call = delta.tool_calls[0].function if delta.tool_calls else None
            text += (call.arguments if call else delta.content) or ""
            reason = chunk.choices[0].finish_reason or reason
            if number == 25:
                worker = kill_the_worker_of(stack, chunk.id)
        assert worker is not None
        message = calm.message
        calls = message.tool_calls
        assert text == (calls[0].function.arguments if calls else message.content)
        assert reason == calm.finish_reason
        wait_until(lambda: stack.workers_seen(stack.url) == 2, "both workers serve", 90)


def kill_the_worker_of(stack, session):
    """Kill the worker that runs a session; returns its pid."""

    async def pid_of():
        store = Store(connect(stack.redis_url))
        try:
            record = await SessionLog(store).record(session)
            workers = await Fleet(store).live()
        finally:
            await store.close()
        assert record.status == "running"
        return next(worker.pid for worker in workers if worker.id == record.worker)

    pids = [worker["pid"] for worker in stack.state["workers"]]
    return stack.kill("workers", pids.index(asyncio.run(pid_of())))


def test_calls_with_tagged_parameters_stream_and_survive_their_worker(xml_stack):
    """For such a template calls are read, follow their schemas, go back, and outlive a kill."""
    properties = {**SCHEMA["properties"], "n": {"type": "array", "items": {"enum": [1, 22]}}}
    properties["n"] |= {"minItems": 3, "maxItems": 3}
    schema = SCHEMA | {"properties": properties, "required": list(properties)}
    look = {"type": "function", "function": {"name": "look", "parameters": schema}}
    request = BASE | {"tools": [look], "tool_choice": "required", "seed": 5, "max_tokens": 300}
    request["parallel_tool_calls"] = False
    url = f"{xml_stack.url}/v1"
    with OpenAI(base_url=url, api_key="none", _strict_response_validation=True) as client:
        calm = client.chat.completions.create(**request).choices[0]
        [call] = calm.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), schema)
        text, reason, killed = "", None, None
        for chunk in client.chat.completions.create(**request, stream=True):
            choice = chunk.choices[0]
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                text += part.function.arguments
                killed = killed or kill_the_worker_of(xml_stack, chunk.id)
        assert killed
        assert (text, reason) == (call.function.arguments, "tool_calls")
        result = {"role": "tool", "tool_call_id": call.id, "content": "waves"}
        turn = [*ASK, calm.message.model_dump(exclude_none=True), result]
        plain = client.chat.completions.create(**BASE | {"tools": [look], "max_tokens": 2})
        longer = client.chat.completions.create(
            **BASE | {"messages": turn, "tools": [look], "max_tokens": 2}
        )
        assert longer.usage.prompt_tokens > plain.usage.prompt_tokens + 20
        look["function"] |= {"parameters": schema | {"patternProperties": {"^x": {}}}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**request)
        assert caught.value.param == "tools"
