"""The detokenizer against the tokenizer's decoding of all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from worker.engine.detokenizer import Detokenizer
from worker.engine.messages import Piece
from worker.tools.text import overlap

CORPUS = [
    "<think>\nThe user asks for the answer. Let me think about it.\n</think>\n\nThe answer is 42.",
    "Stop here. END of the text, the end. Émile naïvely ate 3 crêpes — “bon”! 日本語 中文 🙂👩‍👩‍👧",
    "stop stopping stops\n\nHuman: hello\nAssistant: hi there, this is a test of the text",
] * 3


def train() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer with Qwen's kinds of added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


TOKENIZER = train()
SIZE = len(TOKENIZER)
EOS = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
CLOSE_ID = TOKENIZER.convert_tokens_to_ids("</think>")


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def spell(text: str) -> list[int]:
    """Encode byte by byte, as no tokenizer would, but a model may."""
    alphabet = TOKENIZER.backend_tokenizer
    return [
        alphabet.token_to_id(pre_tokenizers.ByteLevel(False).pre_tokenize_str(char)[0][0][i])
        for char in text
        for i in range(len(char.encode()))
    ]


def run(ids: list[int], **kwargs: Any) -> tuple[list[list[Piece]], Detokenizer]:
    """Push until a stop string is found, then finish; return the pieces of each call."""
    detokenizer = Detokenizer(TOKENIZER, **kwargs)
    calls = []
    for token in ids:
        calls.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*calls, detokenizer.finish()], detokenizer


def shown(calls: list[list[Piece]], channel: str) -> str:
    return "".join(piece.text for call in calls for piece in call if piece.channel == channel)


def texts(ids: list[int], **kwargs: Any) -> tuple[str, str]:
    calls, _ = run(ids, **kwargs)
    return shown(calls, "reasoning"), shown(calls, "content")


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Cut before the stop string that is complete first (the longest of several)."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return (text[: min(found)[1]], True) if found else (text, False)


def reference(ids: list[int], stop: tuple[str, ...], *, thinking: bool) -> tuple[str, str]:
    """Reasoning and content by plain string work on the whole text."""
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    reasoning = ""
    if text.startswith("<think>") and not thinking:
        text, thinking = text[len("<think>") :].lstrip("\n"), True
    if thinking:
        reasoning, tag, text = text.partition("</think>")
        text = text.lstrip("\n")
        reasoning, stopped = cut(reasoning, stop)
        if stopped or not tag:
            return reasoning, ""
    return reasoning, cut(text, stop)[0]


WORDS = [
    "</think>", "<think>", "</thi", "<", "\n", "\n\n", "END", "EN", "stop", "sto", " the", "aa",
    "a", "🙂", "👩‍👩‍👧", "é", "日本", "\ufffd", " ", "Human:", "x",
]  # fmt: skip
some_ids = st.one_of(
    st.sampled_from(WORDS).map(encode),
    st.sampled_from(WORDS).map(spell),
    st.integers(0, SIZE + 3).map(lambda token: [token]),
    st.integers(128, 255).map(lambda b: [spell(bytes([b]).decode("latin1"))[-1]]),
    st.just([EOS]),
    st.just([CLOSE_ID]),
    st.just(spell("日")[:2]),
)
id_lists = st.lists(some_ids, max_size=25).map(lambda parts: [i for part in parts for i in part])
stops = st.lists(
    st.one_of(
        st.sampled_from(
            ["END", "stop", "the end", "\n\n", "aa", "aab", "a", "🙂", "</t", "\ufffd"]
        ),
        st.text(alphabet="aENDst <\n/", min_size=1, max_size=5),
    ),
    max_size=4,
).map(tuple)


@settings(max_examples=400, deadline=None)
@given(ids=id_lists, stop=stops, thinking=st.booleans())
@example(ids=spell("🙂"), stop=(), thinking=False)
@example(ids=encode("a</think>\n\nb"), stop=("b",), thinking=True)
def test_the_pieces_add_up_to_the_whole_text(ids, stop, thinking):
    """Reasoning and content equal string work on the whole text; every pushed id comes out once."""
    calls, detokenizer = run(ids, stop=stop, thinking=thinking)
    expected = reference(ids, stop, thinking=thinking)
    assert (shown(calls, "reasoning"), shown(calls, "content")) == expected
    pushed = ids[: len(calls) - 1]
    assert [i for call in calls for piece in call for i in piece.ids] == pushed
    assert detokenizer.stopped or pushed == ids
    assert detokenizer.finish() == []


@settings(max_examples=200, deadline=None)
@given(ids=id_lists, stop=stops, thinking=st.booleans(), min_tokens=st.integers(0, 30))
def test_replay_goes_on_where_the_log_ends(ids, stop, thinking, min_tokens):
    """After a replay of the ids of any number of pieces, the later pieces are the same."""
    kwargs = {"stop": stop, "thinking": thinking, "min_tokens": min_tokens}
    calls, original = run(ids, **kwargs)
    pushed = ids[: len(calls) - 1]
    logged: list[int] = []
    for index, call in enumerate(calls[:-1]):
        logged += [i for piece in call for i in piece.ids]
        successor = Detokenizer(TOKENIZER, **kwargs)
        successor.replay(logged)
        later = [piece for token in pushed[len(logged) :] for piece in successor.push(token)]
        later += successor.finish()
        assert later == [piece for call in calls[index + 1 :] for piece in call]
        assert successor.stopped == original.stopped
        assert successor.reasoning_tokens == original.reasoning_tokens


@settings(max_examples=100, deadline=None)
@given(ids=id_lists, stop=stops, thinking=st.booleans())
def test_replay_of_everything_knows_that_it_has_ended(ids, stop, thinking):
    """A successor that finds all ids in the log knows of the stop string and says nothing more."""
    calls, original = run(ids, stop=stop, thinking=thinking)
    successor = Detokenizer(TOKENIZER, stop=stop, thinking=thinking)
    successor.replay(ids[: len(calls) - 1])
    assert successor.stopped == original.stopped
    assert successor.finish() == []


@settings(max_examples=200, deadline=None)
@given(ids=id_lists, stop=stops, thinking=st.booleans())
def test_every_piece_but_the_last_has_text(ids, stop, thinking):
    """No call gives an empty piece, save the last one for ids that have nothing to show."""
    calls, _ = run(ids, stop=stop, thinking=thinking)
    assert all(piece.text for call in calls[:-1] for piece in call)
    assert len(calls[-1]) <= 2


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), data=st.data())
def test_text_waits_only_for_what_it_may_become(text, data):
    """What is held back after a token is less than a character, or the start of a stop string."""
    ids = encode(text)
    assume("think>" not in text)
    stop = data.draw(stops)
    detokenizer, out = Detokenizer(TOKENIZER, stop=stop), ""
    for count, token in enumerate(ids, 1):
        out += "".join(piece.text for piece in detokenizer.push(token))
        if detokenizer.stopped:
            return
        whole = TOKENIZER.decode(ids[:count]).rstrip("\ufffd")
        held = whole[len(out) :]
        last = TOKENIZER.decode(ids[count - 1 : count])
        starts = [s[:n] for s in (*stop, "<think>") for n in range(1, len(s))]
        # A token leaves whole, so the rest of its text waits with the part that has to.
        assert not held or any(whole.endswith(s) for s in starts) or "\ufffd" in last


@given(text=st.text(alphabet="ab", max_size=8), word=st.text(alphabet="ab", min_size=1, max_size=8))
def test_what_waits_is_the_longest_possible_start(text, word):
    """The held end of a text is its longest end that begins the word without completing it."""
    starts = [n for n in range(len(word)) if text.endswith(word[:n])]
    assert overlap(text, word) == max(starts)


def test_an_emoji_over_four_tokens_comes_out_once():
    """Nothing is shown until the last byte is there, and then it comes with all four ids."""
    ids = spell("🙂")
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in ids[:3]] == [[], [], []]
    assert detokenizer.push(ids[3]) == [Piece(tuple(ids), "🙂", "content")]


def test_a_broken_character_at_the_end_becomes_a_replacement_character():
    """An output that ends inside a character shows U+FFFD when it is finished."""
    ids = [*encode("ok "), *spell("日")[:2]]
    assert texts(ids) == ("", "ok \ufffd")


def test_endless_invalid_bytes_are_shown_as_they_come():
    """A model that only gives broken bytes does not make the text wait for ever."""
    detokenizer = Detokenizer(TOKENIZER)
    token = spell("日")[0]
    out = [piece for _ in range(500) for piece in detokenizer.push(token)]
    assert sum(len(piece.ids) for piece in out) >= 496
    text = "".join(piece.text for piece in [*out, *detokenizer.finish()])
    assert text == TOKENIZER.decode([token] * 500)


def test_a_stop_string_over_several_tokens_is_never_shown():
    """Its start waits, its end drops it, and the ids of all of it are in the last piece."""
    ids = [*spell("okSTOP"), *encode("never seen")]
    calls, detokenizer = run(ids, stop=("STOP",))
    o, k, *rest = spell("okSTOP")
    assert calls[:2] == [[Piece((o,), "o", "content")], [Piece((k,), "k", "content")]]
    assert calls[2:] == [[], [], [], [], [Piece(tuple(rest), "", "content")]]
    assert detokenizer.stopped


def test_text_that_only_looked_like_a_stop_string_is_shown():
    """Held text comes out with the token that proves it harmless."""
    detokenizer = Detokenizer(TOKENIZER, stop=("END",))
    e, n, x = spell("ENx")
    assert detokenizer.push(e) == detokenizer.push(n) == []
    assert detokenizer.push(x) == [Piece((e, n, x), "ENx", "content")]


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (("bcd", "c"), "abcd", "ab"),
        (("c", "bc"), "abcd", "a"),
        (("aab", "aa"), "xaab", "x"),
        (("aba",), "abababa", ""),
        (("aab",), "aaab", "a"),
        ((".", ""), "ab.c", "ab"),
        (("axay",), "baxay", "b"),
        (("\n\n",), "\n\n", ""),
    ],
)
def test_the_stop_string_that_is_complete_first_wins(stop, text, expected):
    """Whether the text comes byte by byte or whole, it is cut at the same place."""
    assert texts(spell(text), stop=stop) == ("", expected)
    assert texts(encode(text), stop=stop) == ("", expected)


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, "x"), (3, "x"), (4, "xab"), (5, "xab"), (6, "xabab"), (7, "xabab"), (8, "xababab")],
)
def test_stop_strings_count_from_min_tokens_on(min_tokens, expected):
    """A stop string that ends before the `min_tokens`-th token is text; a later one ends it."""
    assert texts(spell("xababab"), stop=("ab",), min_tokens=min_tokens) == ("", expected)


def test_a_thought_ends_at_its_tag():
    """The tag and the newlines after it are dropped; the thought's tokens include the tag."""
    thought, answer = encode("hmm\n"), encode("\n\nyes\n\nno")
    calls, detokenizer = run([*thought, CLOSE_ID, *answer], thinking=True)
    assert (shown(calls, "reasoning"), shown(calls, "content")) == ("hmm\n", "yes\n\nno")
    assert detokenizer.reasoning_tokens == len(thought) + 1


@pytest.mark.parametrize("write", [encode, spell])
def test_a_tag_may_be_spelled_in_any_tokens(write):
    """A tag of several tokens splits as the single token does."""
    assert texts(write("hmm</think>\nyes"), thinking=True) == ("hmm", "yes")
    assert texts(write("<think>\nhmm</think>\nyes")) == ("hmm", "yes")


def one_word(word: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose token 0 is `word`."""
    model = models.WordLevel({word: 0, "?": 1}, unk_token="?")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def test_stop_strings_inside_one_token_count_as_if_it_came_in_parts():
    """The one that is complete first wins, not the one that begins first."""
    detokenizer = Detokenizer(one_word("abcd"), stop=("bcd", "c"))
    assert [*detokenizer.push(0), *detokenizer.finish()] == [Piece((0,), "ab", "content")]


def test_a_token_on_both_sides_of_the_tag_gives_two_pieces():
    """Text of both channels in one token: two pieces, and the id in the second of them."""
    pieces = Detokenizer(one_word("a</think>b"), thinking=True).push(0)
    assert pieces == [Piece((), "a", "reasoning"), Piece((0,), "b", "content")]


def test_a_truncated_thought_stays_reasoning():
    """Without a closing tag there is no answer, and half a tag is part of the thought."""
    ids = encode("hmm </thi")
    calls, detokenizer = run(ids, thinking=True)
    assert (shown(calls, "reasoning"), shown(calls, "content")) == ("hmm </thi", "")
    assert detokenizer.reasoning_tokens == len(ids)


def test_tags_elsewhere_are_text():
    """An opening tag that is not at the start, and a closing one in the answer, are shown."""
    assert texts(encode("say <think>")) == ("", "say <think>")
    assert texts(encode("say </think>")) == ("", "say </think>")
    assert texts(encode("hm</think>say </think>"), thinking=True) == ("hm", "say </think>")


def test_an_output_without_thought_counts_no_reasoning():
    """No tag, no reasoning tokens."""
    assert run(encode("plain"))[1].reasoning_tokens == 0


def test_a_stop_string_does_not_reach_from_thought_to_answer():
    """The end of the thought and the start of the answer together are no stop string."""
    assert texts(encode("hm E</think>ND yes"), stop=("END",), thinking=True) == ("hm E", "ND yes")
    assert texts(encode("hm</think>\n\nyes"), stop=("\n\n",), thinking=True) == ("hm", "yes")
    stop = ("m</think>N",)  # what was held for it is let go
    assert texts(encode("hm</think>ND yes"), stop=stop, thinking=True) == ("hm", "ND yes")
    assert texts(encode("hm END</think>yes"), stop=("END",), thinking=True) == ("hm ", "")


def test_special_and_hidden_tokens_have_no_text():
    """EOS, and stop tokens named as hidden, add ids only."""
    (x,) = spell("x")
    calls, _ = run([*spell("a"), EOS, x], hidden=[x])
    assert [p for call in calls for p in call] == [
        Piece(tuple(spell("a")), "a", "content"),
        Piece((EOS, x), "", "content"),
    ]


def test_a_tag_that_begins_inside_a_token_survives_a_takeover():
    """A token that ends in half a tag is not logged without the other half."""
    rest = spell("/think>b")
    broken = spell("日")[0]  # settled by the token after it, together with that one
    half = [broken, *spell("<")]
    calls, _ = run([*half, *rest], thinking=True)
    released = [piece for call in calls for piece in call]
    assert released[0] == Piece((*half, *rest[:-1]), "\ufffd", "reasoning")
    successor = Detokenizer(TOKENIZER, thinking=True)
    successor.replay(released[0].ids)
    assert successor.push(rest[-1]) == [Piece((rest[-1],), "b", "content")]


def test_a_special_token_inside_a_character_does_not_break_it():
    """The character's bytes join across the special token, as they do in the whole decoding."""
    a, b, c = spell("日")
    calls, _ = run([a, EOS, b, EOS, c])
    assert [p for call in calls for p in call] == [Piece((a, EOS, b, EOS, c), "日", "content")]


def metaspace() -> PreTrainedTokenizerFast:
    """Make a tokenizer in SentencePiece's manner: `▁` for spaces, byte tokens as a last resort."""
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["<unk>", *byte_tokens, "▁", *"abcdefghi", "▁a", "▁the", "hi", "▁hi"]
    merges = [("▁", "a"), ("h", "i"), ("▁", "hi")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


SENTENCEPIECE = metaspace()


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(["▁", "▁a", "▁hi", "hi", "b", "🙂", "é", "日"]), max_size=20))
def test_decoders_that_need_context_give_the_whole_text_too(words):
    """Leading spaces and byte tokens come out as in the decoding of all tokens at once."""
    ids = []
    for word in words:
        token = SENTENCEPIECE.convert_tokens_to_ids(word)
        found = token is not None and token != SENTENCEPIECE.convert_tokens_to_ids("<unk>")
        ids += [token] if found else [b + 1 for b in word.encode()]
    detokenizer = Detokenizer(SENTENCEPIECE)
    pieces = [p for token in ids for p in detokenizer.push(token)] + detokenizer.finish()
    assert "".join(p.text for p in pieces) == SENTENCEPIECE.decode(ids)
    assert [i for p in pieces for i in p.ids] == ids
