"""`/v1/responses` with the official SDKs on whole stacks: cut, killed, cancelled, left alone."""

import asyncio
import itertools
import json
import random
import shutil

import openai
import pytest
from openai import OpenAI

from tests.client_kit import output_of
from tests.media_samples import data_url, encode, picture
from tests.responses_kit import check_whole, text_of, without_names
from tests.stack import Stack, clean_environment, wait_until

LONG = {
    "model": "any",
    "input": "Go on and on.",
    "background": True,
    "max_output_tokens": 400,
    "extra_body": {"ignore_eos": True, "seed": 11},
}
DROPS = 20
pytestmark = pytest.mark.timeout(330)  # the first test on a stack also waits for its start
UNWATCHED_SECONDS = 2


def connect(url, **options):
    return OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=8,
        _strict_response_validation=True,
        **options,
    )


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory, demo_model):
    """Two gateways and two workers whose parts may be killed; leaving is noticed after 2 s."""
    env = {
        "TORCH_DTYPE": "float64",
        "CANCEL_AFTER_DISCONNECT_SECONDS": str(UNWATCHED_SECONDS),
        "MAX_TOKENS": "6000",
    }
    folder = tmp_path_factory.mktemp("responses") / "data"
    with Stack(folder, gateways=2, workers=2, env=env) as running:
        yield running


@pytest.fixture
def clients(stack2):
    """An SDK client of each gateway of the shared stack."""
    made = [connect(gateway["url"]) for gateway in stack2.gateways]
    yield made
    for client in made:
        client.close()


def plain(events):
    return [event.to_dict(mode="json") for event in events]


def read_to(stream, number):
    """Read up to the event of that number, and drop the connection."""
    events = []
    for event in stream:
        events.append(event)
        if event.sequence_number == number:
            stream.close()
            break
    return events


def runs_of(stack, session_id):
    """Return the workers that began the session, in the order of their logs."""
    logs = sorted((stack.folder / "logs").glob("worker*.log"))
    wanted = [f'"{session_id}"', '"stream start"']
    return [
        number for number, log in enumerate(logs) for line in log.read_text().splitlines()
        if all(word in line for word in wanted)
    ]  # fmt: skip


def test_dropped_twenty_times_among_kills_it_is_an_undisturbed_one(own_stack):
    """Resumed 20 times on the other gateway, a worker and a gateway killed, it is whole."""
    made = [connect(gateway["url"]) for gateway in own_stack.gateways]
    whole = plain(made[0].responses.create(**LONG, stream=True))
    drops = sorted(random.Random(5).sample(range(1, len(whole) - 2), DROPS))

    stream, got, gateway = made[0].responses.create(**LONG, stream=True), [], 0
    for turn, number in enumerate(drops):
        got += read_to(stream, number)
        made_id = got[0].response.id
        if turn == 4:
            [worker] = runs_of(own_stack, made_id)
            own_stack.kill("workers", worker)
        if turn == 9:
            own_stack.kill("gateways", gateway)
        gateway = 1 - gateway
        stream = made[gateway].responses.retrieve(made_id, stream=True, starting_after=number)
    got = plain([*got, *stream])

    final = check_whole(got)
    assert [e["sequence_number"] for e in got] == [e["sequence_number"] for e in whole]
    assert without_names(final) == without_names(check_whole(whole))
    assert sorted(runs_of(own_stack, made_id)) == [0, 1], "another worker has taken over"
    for client in made:  # both gateways, one of them new
        assert client.responses.retrieve(made_id).to_dict(mode="json") == final
        client.close()


def test_only_a_background_response_goes_on_unwatched(own_stack):
    """A plain stream that its client leaves is abandoned, as a chat is; in the background not."""
    endless = {**LONG, "max_output_tokens": 6000, "stream": True}
    with connect(own_stack.url) as client:
        made = []
        for background in (True, False):
            stream = client.responses.create(**{**endless, "background": background})
            made.append(read_to(stream, 4)[0].response.id)
        left, plain_one = made

        def abandoned():
            return client.responses.retrieve(plain_one).status == "cancelled"

        wait_until(abandoned, "the plain one is cancelled", 30)
        ended = client.responses.retrieve(plain_one)
        assert ended.session["reason"] == "abandoned"
        assert client.responses.retrieve(left).status == "in_progress"
        assert client.responses.cancel(left).session["reason"] == "requested"


def test_a_running_response_is_cancelled_from_the_other_gateway(clients):
    """The answer is the Response as it ended, each time; its stream ends with all that was said."""
    one, two = clients
    stream = one.responses.create(**{**LONG, "max_output_tokens": 3000}, stream=True)
    events = list(itertools.islice(stream, 9))
    made = events[0].response.id
    answers = [client.responses.cancel(made) for client in (two, one, two)]
    final = check_whole(plain([*events, *stream]))
    assert (final["status"], final["session"]["reason"]) == ("cancelled", "requested")
    assert [answer.to_dict(mode="json") for answer in answers] == [final] * 3
    two.responses.delete(made)
    with pytest.raises(openai.NotFoundError):
        one.responses.retrieve(made)


def test_a_running_response_is_deleted(clients):
    """It is cancelled, and then nothing is left of it for anybody."""
    one, two = clients
    stream = one.responses.create(**{**LONG, "max_output_tokens": 3000}, stream=True)
    made = read_to(stream, 5)[0].response.id
    two.responses.delete(made)
    for client in clients:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made)


@pytest.fixture
def said(clients):
    """A Response that ended by itself: its request, its events and what it said."""
    request = {**LONG, "max_output_tokens": 60}
    text = everything(clients[0].responses.create(**{**request, "background": False}))
    stop = {"stop": text[len(text) // 2 :][:6]}
    return {**request, "extra_body": {**LONG["extra_body"], **stop}}


def everything(response):
    final = response.to_dict(mode="json")
    return text_of(final, "reasoning") + text_of(final)


def test_the_sdks_helper_makes_and_resumes(clients, said):
    """`responses.stream` accumulates a new Response, and one that it comes back to."""
    one, two = clients
    with one.responses.stream(**said) as stream:
        events = [next(stream) for _ in range(3)]
    made, reached = events[0].response.id, events[-1].sequence_number
    with two.responses.stream(response_id=made, starting_after=reached) as stream:
        rest = [event.sequence_number for event in stream]
        final = stream.get_final_response()
    assert rest == list(range(reached + 1, reached + 1 + len(rest)))
    assert (final.status, final.id) == ("completed", made)
    whole = two.responses.create(**{**said, "background": False})
    assert everything(final) == everything(whole)
    assert final.output_text == whole.output_text


def test_the_chat_that_it_is_has_the_same_text(clients):
    """A Response is seen as a chat completion too, with the text and counts of an equal chat."""
    one, two = clients
    request = {"model": "any", "max_output_tokens": 40, "temperature": 0}
    made = one.responses.create(input="Hello!", **request)
    seen = two.chat.completions.retrieve(made.id).choices[0].message
    assert (seen.reasoning_content or "") + seen.content == everything(made)
    chat = two.chat.completions.create(
        model="any", max_tokens=40, temperature=0, messages=[{"role": "user", "content": "Hello!"}]
    )
    assert chat.choices[0].message.reasoning_content == seen.reasoning_content
    assert chat.usage.total_tokens == made.usage.total_tokens


def test_images_and_instructions_reach_the_model(clients):
    """They cost prompt tokens, and a broken image is the contract's 400."""
    client = clients[0]
    image = {"type": "input_image", "image_url": data_url(encode(picture()), "image/png")}
    content = [image, {"type": "input_text", "text": "What colour is it?"}]
    asked = {"model": "any", "max_output_tokens": 1}
    text = client.responses.create(input="What colour is it?", **asked)
    more = client.responses.create(input=[{"role": "user", "content": content}], **asked)
    told = client.responses.create(input="What colour is it?", instructions="Be brief.", **asked)
    assert more.usage.input_tokens > text.usage.input_tokens < told.usage.input_tokens
    broken = {**image, "image_url": data_url(b"no image", "image/png")}
    ask = {**asked, "input": [{"role": "user", "content": [broken]}]}
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(**ask)
    assert raised.value.code == "invalid_media"
    failed = check_whole(plain(client.responses.create(**ask, background=True, stream=True)))
    assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_image")


@pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed")
def test_openai_node_resumes_by_itself(js, stack2, clients):
    """Cut at 20 events and resumed on the other gateway, openai-node has all of them once."""
    ask = {**LONG, **LONG["extra_body"], "max_output_tokens": 300}
    del ask["extra_body"]
    whole = plain(clients[0].responses.create(**{**LONG, "max_output_tokens": 300}, stream=True))
    drops = sorted(random.Random(6).sample(range(1, len(whole) - 2), DROPS))
    urls = [gateway["url"] for gateway in stack2.gateways]
    argument = json.dumps({"urls": urls, "ask": ask, "drops": drops, "helper": drops[3]})
    program = output_of("node", "responses.mjs", argument, cwd=js, env=clean_environment())
    result = json.loads(asyncio.run(program))
    final = check_whole(result["events"])
    assert without_names(final) == without_names(check_whole(whole))
    assert result["numbers"] == list(range(drops[3] + 1, len(whole)))
    for item in result["final"]["output"]:
        for part in item["content"]:
            part.pop("parsed", None)  # the helper's own
    assert result["final"]["output"] == result["retrieved"]["output"] == final["output"]
