"""Log-probabilities: of chats, of completions with and without their prompts, and as evaluation harnesses ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import openai
import pytest

from deepwright_core.engine import TokenScore
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.answer import Answer, Scored
from deepwright_serve.scores import chat_logprobs, text_logprobs

TEXT = "17 🚀 42"


def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=20)


def chat(server: Any, **fields: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    return client(server).chat.completions.create(model="tiny", messages=messages, **fields)


def test_a_chats_tokens_are_those_of_its_content(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted(f"<think>hm</think>{TEXT}")
    content = chat(server, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert server.engine.asked[0][1].scores == 3
    assert b"".join(bytes(token.bytes) for token in content).decode() == TEXT
    # Tokens that are no whole characters are written as bytes.
    assert [t.token for t in content if t.token.startswith("bytes:")] == [
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(i))
        for i in tokenizer.encode(TEXT)
        if tokenizer.token_bytes(i)[-1:] >= b"\x80"
    ]
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 3 for token in content)
    assert all(token.top_logprobs[0].token == token.token for token in content)
    bare = chat(server, logprobs=True).choices[0].logprobs.content
    assert [token.top_logprobs for token in bare] == [[]] * len(content)
    assert chat(server).choices[0].logprobs is None and server.engine.asked[-1][1].scores is None


@pytest.mark.parametrize("stop", [openai.omit, "42", "🚀", " 4"])
def test_streamed_tokens_are_the_whole_ones_up_to_the_stop(scripted: Callable[[str], Any], stop: Any) -> None:
    server = scripted(TEXT)
    whole = chat(server, logprobs=True, stop=stop)
    streamed, text = [], ""
    for chunk in chat(server, logprobs=True, stop=stop, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            streamed += choice.logprobs.content if choice.logprobs else []
    assert streamed == whole.choices[0].logprobs.content
    data = b"".join(bytes(token.bytes) for token in streamed).decode(errors="replace")
    # The token in which a stop string begins may bring a beginning that belongs to the answer.
    assert data.startswith(text) and (data == text or stop != openai.omit)
    assert text == whole.choices[0].message.content


def test_completions_list_every_token(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted(" is 42")
    for stream in (False, True):
        replies = client(server).completions.create(model="tiny", prompt="x", logprobs=2, stream=stream)
        tokens: list[str] = []
        offsets: list[int] = []
        tops: list[Any] = []
        for choice in [c for chunk in replies for c in chunk.choices] if stream else replies.choices:
            if choice.logprobs:
                tokens += choice.logprobs.tokens
                offsets += choice.logprobs.text_offset
                tops += choice.logprobs.top_logprobs
        assert "".join(tokens) == " is 42<｜end▁of▁sentence｜>"
        assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens))]
        assert all(top[token] == -0.5 for token, top in zip(tokens, tops, strict=True))


def test_a_harness_scores_texts(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    """lm-evaluation-harness, local-completions: context and continuation as ids, one token more, and nothing shown."""
    server = scripted("!")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("The answer is 42.", "def 🙂")]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    reply = server.client.post("/v1/completions", json={"model": "tiny", "prompt": prompts, **asked}).json()
    for index, prompt in enumerate(prompts):
        choice = next(c for c in reply["choices"] if c["index"] == index)
        scores, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(scores) == len(tops) == len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        assert scores[0] is None and tops[0] is None
        assert all(isinstance(score, float) for score in scores[1:])
        assert all(isinstance(p, float) and isinstance(t, str) for top in tops[1:] for t, p in top.items())
        # What the harness makes of it: the sum over the continuation, and whether greedy search would have said it.
        assert math.isclose(sum(scores[2:-1]), -0.5 * (len(prompt) - 2))
        assert all(score == max(top.values()) for score, top in zip(scores[2:-1], tops[2:-1], strict=True))
        assert choice["text"] == tokenizer.decode(prompt) + "!"
    assert [params.prompt_scores for _, params, _ in server.engine.asked] == [1, 1]
    generated = {"model": "tiny", "prompt": [prompts[0]], "max_tokens": 8, "temperature": 0, "stop": ["\n\n", "Q:"]}
    reply = server.client.post("/v1/completions", json=generated | {"seed": 1234}).json()
    assert reply["choices"][0]["text"] == "!"


def test_an_echo_without_an_answer(scripted: Callable[[str], Any]) -> None:
    server = scripted("never shown")
    create = client(server).completions.create
    reply = create(model="tiny", prompt="Ein Käse", echo=True, max_tokens=0, logprobs=0, n=2)
    for choice in reply.choices:
        assert choice.text == "Ein Käse" and choice.finish_reason == "length"
        assert "".join(choice.logprobs.tokens) == "<｜begin▁of▁sentence｜>Ein Käse"
        assert choice.logprobs.text_offset[:3] == [0, 0, len(choice.logprobs.tokens[1])]
        assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [1] * (len(choice.logprobs.tokens) - 1)
    assert reply.usage.completion_tokens == 0
    server = scripted(" und Brot")
    chunks = list(create(model="tiny", prompt="Kase", echo=True, stream=True, logprobs=1))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "Kase und Brot"
    tokens = [t for chunk in chunks for c in chunk.choices if c.logprobs for t in c.logprobs.tokens]
    assert "".join(tokens) == "<｜begin▁of▁sentence｜>Kase und Brot<｜end▁of▁sentence｜>"


def test_prompts_have_scores_in_vllms_form(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted("ok")
    body = {"model": "tiny", "prompt": [5, 100, 102], "prompt_logprobs": 2}
    entries = server.client.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert entries[0] is None and len(entries) == 3
    assert entries[1]["100"] == {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode([100])}
    assert [entry["rank"] for entry in entries[2].values()] == [1, 2]
    reply = server.chat(prompt_logprobs=0).json()
    assert len(reply["prompt_logprobs"]) == len(server.engine.asked[-1][0])
    assert all(entry["rank"] is None for token in reply["prompt_logprobs"][1:] for entry in token.values())
    assert "prompt_logprobs" not in server.chat().json()


def test_what_json_cannot_hold(tokenizer: Tokenizer) -> None:
    never = TokenScore(100, -math.inf, ((101, -0.1),))
    assert chat_logprobs(tokenizer, [Scored(never, 0)]).content[0].logprob == -9999.0
    assert text_logprobs(tokenizer, [Scored(never, 0)]).token_logprobs == [-9999.0]


def test_scores_come_once_each_and_not_for_what_was_cut(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, stops=["STOP"])
    ids = tokenizer.encode("a ST b STOP c")
    released = [s for token in ids for s in answer.push(token, TokenScore(token, -1.0, ())).scores]
    assert released == answer.scores and answer.content == "a ST b "
    assert tokenizer.decode([s.score.token_id for s in released]).startswith("a ST b")
    assert len(released) < len(ids)
