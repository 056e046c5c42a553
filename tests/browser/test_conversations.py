"""Conversations in the browser: kept, named, deleted, taken out and in; questions edited, answers side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import answered, ask

pytestmark = pytest.mark.browser


def titles(page: Any) -> list[str]:
    return page.locator("#list .open").all_inner_texts()


def choose(page: Any, row: int, what: str) -> None:
    """Press one of the buttons that a row shows when the mouse is over it."""
    page.locator("#list li").nth(row).hover()
    page.locator("#list li").nth(row).get_by_role("button", name=what).click()


def test_conversations_are_listed_named_deleted_and_brought_back(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    page = new_page(serve_script("Hello."))
    for text in ("first", "second"):
        page.click("#new")
        ask(page, text)
        answered(page)
    assert titles(page) == ["second", "first"]
    page.locator("#list .open", has_text="first").click()
    assert page.locator(".bubble").all_inner_texts() == ["first"]
    choose(page, 1, "Rename")
    page.keyboard.type("  Sums  ")
    page.keyboard.press("Enter")
    assert titles(page) == ["second", "Sums"]
    choose(page, 1, "Rename")
    page.keyboard.type("not this")
    page.keyboard.press("Escape")
    assert titles(page) == ["second", "Sums"]
    choose(page, 1, "Delete")
    assert titles(page) == ["second"] and page.locator(".bubble").all_inner_texts() == ["second"]
    page.click("#news button")
    assert sorted(titles(page)) == ["Sums", "second"] and page.locator(".bubble").all_inner_texts() == ["first"]
    page.reload()
    assert sorted(titles(page)) == ["Sums", "second"] and page.locator(".bubble").all_inner_texts() == ["first"]


def test_an_answer_goes_on_while_another_conversation_is_shown(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("one two three")
    page = new_page(server)
    server.engine.gate.clear()
    ask(page, "slow")
    page.wait_for_selector("#stop:visible")
    page.click("#new")
    assert page.locator("#send").is_visible() and page.locator(".writing").count() == 1
    page.locator("#list .open", has_text="slow").click()
    assert page.locator("#stop").is_visible() and page.locator(".waiting").is_visible()
    server.engine.gate.set()
    assert answered(page).locator(".prose").inner_text() == "one two three"
    assert page.locator(".writing").count() == 0


def begun(page: Any) -> None:
    page.wait_for_function("() => document.querySelector('.prose')?.textContent.includes('word')")


def test_what_is_deleted_while_it_is_answered_stays_deleted_and_can_be_brought_back(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("word " * 100)
    server.served.context = 4096
    page = new_page(server)
    ask(page, "gone")
    begun(page)
    choose(page, 0, "Delete")
    server.until_idle()
    page.wait_for_function("() => running.size === 0")
    assert titles(page) == [] and page.evaluate("document.activeElement.id") == "new"
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('.c.'))") == []
    page.click("#news button")
    assert titles(page) == ["gone"] and "word" in page.locator(".prose").inner_text()


def test_a_page_loaded_again_keeps_what_an_answer_has_brought_and_can_ask_again(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("word " * 100)
    server.served.context = 4096
    page = new_page(server)
    ask(page)
    begun(page)
    page.reload()
    assert "word" in answered(page).locator(".prose").inner_text()
    server.until_idle()
    # A browser that ends without a farewell leaves the question alone.
    page.evaluate("() => { const at = state.current; at.messages.pop(); at.leaf = at.messages[0].id; keep(at); }")
    page.reload()
    page.locator(".turn.user .again").click()
    assert answered(page).locator(".prose").inner_text().count("word") == 100


def test_two_tabs_lose_nothing_of_one_conversation(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("Hello.")
    page = new_page(server)
    ask(page, "first")
    answered(page)
    other = page.context.new_page()
    other.goto(server.address)
    ask(other, "of the other tab")
    answered(other, 2)
    page.wait_for_function("() => state.current.messages.length === 4")
    ask(page, "of this tab")
    assert answered(page, 2) and page.locator(".bubble").all_inner_texts() == ["first", "of this tab"]
    assert page.locator(".turn.user").last.locator(".place").inner_text() == "2 / 2"
    page.reload()
    said = page.evaluate("state.current.messages.filter((one) => one.role === 'user').map((one) => one.content)")
    assert said == ["first", "of the other tab", "of this tab"]


def test_questions_are_edited_and_all_versions_stay(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("Hello.")
    server.engine.script = lambda prompt: [
        *server.served.tokenizer.encode(f"Answer {len(server.engine.asked)}."),
    ]
    page = new_page(server)
    ask(page, "one")
    answered(page)
    ask(page, "two")
    answered(page, 2)
    # An empty message and the arrow up: the last question again.
    page.focus("#question")
    page.keyboard.press("ArrowUp")
    page.locator(".editing textarea").fill("two, better")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.again').length && !document.body.matches('.busy')")
    assert page.locator(".bubble").all_inner_texts() == ["one", "two, better"]
    prompts = [server.served.tokenizer.decode(prompt) for prompt, _, _ in server.engine.asked]
    assert "two, better" in prompts[2] and "two" in prompts[1] and prompts[2].count("two") == 1
    question = page.locator(".turn.user").last
    assert question.locator(".place").inner_text() == "2 / 2"
    question.get_by_role("button", name="The version before").click()
    assert page.evaluate("document.activeElement.ariaLabel") == "The next version"
    assert page.locator(".bubble").all_inner_texts() == ["one", "two"]
    assert page.locator(".prose").all_inner_texts() == ["Answer 1.", "Answer 2."]
    page.locator(".again").click()
    page.wait_for_function("() => document.querySelectorAll('.again').length && !document.body.matches('.busy')")
    assert page.locator(".turn.assistant").last.locator(".place").inner_text() == "2 / 2"
    page.reload()
    assert page.locator(".prose").all_inner_texts() == ["Answer 1.", "Answer 4."]
    # Leaving an edit changes nothing.
    page.locator(".turn.user").first.hover()
    page.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    page.keyboard.type(" no")
    page.keyboard.press("Escape")
    assert page.locator(".bubble").first.inner_text() == "one" and len(server.engine.asked) == 4
    assert page.evaluate("document.activeElement.ariaLabel") == "Edit"


def test_out_and_in_again(serve_script: Callable[..., Any], new_page: Callable[..., Any], tmp_path: Path) -> None:
    server = serve_script("<think>hm</think>Hello.")
    page = new_page(server)
    ask(page, "first")
    answered(page)
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "conversations.json"
    download.value.save_as(path)
    kept = json.loads(path.read_text())
    assert kept["format"] == "deepwright.chat" and len(kept["conversations"][0]["messages"]) == 2
    # What somebody changed in the file is taken as far as it makes sense, and is text.
    hostile = kept["conversations"][0]
    hostile["title"] = "<img src=x onerror=alert(1)>" + "x" * 500
    hostile["messages"] += [{"role": "wizard", "content": 3}, None, {**hostile["messages"][0], "parent": "nowhere"}]
    path.write_text(json.dumps(kept))
    page.set_input_files("#file", path)
    page.wait_for_function("() => document.querySelectorAll('#list li').length === 2")
    assert any(title.startswith("<img src=x") and len(title) == 80 for title in titles(page))
    path.write_text("no json")
    page.set_input_files("#file", path)
    page.wait_for_function("() => document.getElementById('news').textContent.includes('no JSON')")
    path.write_text('{"format": "other"}')
    page.set_input_files("#file", path)
    page.wait_for_function("() => document.getElementById('news').textContent.includes('no conversations')")
    assert len(titles(page)) == 2


def test_a_full_storage_is_told_and_loses_nothing(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    page = new_page(serve_script("Hello."))
    page.evaluate(
        """() => {
            for (let size = 1 << 22; size >= 1; size >>= 1)
                try { for (let n = 0; ; n += 1) localStorage.setItem(`fill.${size}.${n}`, 'x'.repeat(size)); } catch {}
        }"""
    )
    ask(page, "one")
    assert answered(page).locator(".prose").inner_text() == "Hello."
    assert "no room left" in page.locator("#news").inner_text()
    ask(page, "two")
    answered(page, 2)
