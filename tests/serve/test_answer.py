"""Token ids to text: thinking apart, stop strings cut wherever tokens break, characters whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_core.engine import TokenScore
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.answer import Answer, Continuation, Delta, StopStrings


def feed(answer: Answer, tokenizer: Tokenizer, text: str) -> tuple[str, str]:
    """Push a text's tokens; returns reasoning and content as the deltas gave them."""
    deltas = [answer.push(token) for token in tokenizer.encode(text, allow_special=True)]
    deltas.append(answer.finish())
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)


def test_thinking_is_told_by_token_and_not_by_text(tokenizer: Tokenizer) -> None:
    assert feed(Answer(tokenizer), tokenizer, "<think>17 + 25</think>42 🙂") == ("17 + 25", "42 🙂")
    literal = Answer(tokenizer)
    for token in tokenizer.encode("<think>no</think>", allow_special=False):
        literal.push(token)
    literal.finish()
    assert (literal.reasoning, literal.content) == ("", "<think>no</think>")


def test_a_thought_opened_by_the_prompt_counts_from_the_first_token(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, thinking=True)
    assert feed(answer, tokenizer, "hm</think>42") == ("hm", "42")
    thought = len(tokenizer.encode("hm")) + 1
    assert (answer.reasoning_tokens, answer.tokens) == (thought, thought + len(tokenizer.encode("42")))


def test_an_unfinished_thought_leaves_no_content(tokenizer: Tokenizer) -> None:
    assert feed(Answer(tokenizer), tokenizer, "<think>still at it") == ("still at it", "")


def test_a_late_think_token_opens_nothing(tokenizer: Tokenizer) -> None:
    assert feed(Answer(tokenizer), tokenizer, "a<think>b</think>c") == ("", "abc")


def test_stop_strings_do_not_cut_a_thought(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, stops=["STOP"])
    assert feed(answer, tokenizer, "<think>STOP here</think>one STOP two") == ("STOP here", "one ")
    assert answer.stopped and answer.content == "one "


def test_a_broken_character_at_the_end_shows_as_replacement(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer)
    first_byte = tokenizer.encode("🚀")[0]
    assert answer.push(first_byte).content == ""
    assert answer.finish().content == "\ufffd"


def test_a_completion_writes_the_tags_out(tokenizer: Tokenizer) -> None:
    text = "<think>17</think>42<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"
    assert feed(Continuation(tokenizer), tokenizer, text) == ("", text)
    assert feed(Continuation(tokenizer), tokenizer, "a<｜User｜>b<｜end▁of▁sentence｜>") == ("", "ab")


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    stops=st.lists(st.sampled_from(["a", "ab", " is", "42", "你", "\ufffd", "zz"]), max_size=3),
    calls=st.booleans(),
    thinking=st.booleans(),
)
def test_whatever_is_drawn_the_pieces_make_up_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str], calls: bool, thinking: bool
) -> None:
    marks = st.sampled_from(sorted(tokenizer.marks.values()))
    ids = data.draw(st.lists(marks | st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    for answer in (
        Answer(tokenizer, stops=stops, calls=calls, thinking=thinking),
        Continuation(tokenizer, stops=stops),
    ):
        total = Delta()
        for token in ids:
            total += answer.push(token, TokenScore(token, -1.0, ()))
        total += answer.finish()
        assert (total.content, total.reasoning) == (answer.content, answer.reasoning)
        assert list(total.scores) == answer.scores
        offsets = [scored.offset for scored in answer.scores]
        assert offsets == sorted(offsets) and all(offset <= len(answer.content) for offset in offsets)
        assert not answer.stopped or all(offset < len(answer.content) for offset in offsets)
        assert not any(stop in answer.content for stop in stops)
        for index, call in enumerate(answer.calls):
            pieces = [piece for piece in total.calls if piece.index == index]
            assert pieces[0].name == call.name != "" and all(piece.name is None for piece in pieces[1:])
            assert "".join(piece.arguments for piece in pieces) == call.arguments
        assert answer.tokens <= len(ids) and answer.reasoning_tokens <= answer.tokens
        if not stops and isinstance(answer, Continuation):
            assert [scored.score.token_id for scored in answer.scores] == ids


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_cut_the_same_however_the_text_is_broken_up(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    scanner, out, place = StopStrings(stops), "", 0
    while place < len(text) and not scanner.found:
        size = data.draw(st.integers(1, 5))
        out += scanner.push(text[place : place + size])
        place += size
    if not scanner.found:
        out += scanner.flush()
    # A stop string ends the text once it is complete: the one that completes first decides.
    ends = [
        next((n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)), None),
    ]
    if ends[0] is None:
        assert out == text
    else:
        assert text.startswith(out) and not any(stop in out for stop in stops)
        assert any(text[len(out) :].startswith(stop) for stop in stops)
