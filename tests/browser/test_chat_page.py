"""The chat page in a real browser: asking, thinking, stopping, keeping, and never running what a model wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import answered, ask

pytestmark = pytest.mark.browser

ANSWER = "<think>7 + 9 = 16, carry 1.</think>The sum is **936**.\n\n```python\nprint(347 + 589)\n```\n\n- one\n- two"


def test_an_answer_with_its_thoughts_folded(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    server = serve_script(ANSWER)
    page = new_page(server)
    assert page.locator("#send").is_disabled() and page.locator("#welcome").is_visible()
    ask(page)
    answer = answered(page)
    assert answer.locator("strong").inner_text() == "936"
    assert answer.locator("pre code").inner_text() == "print(347 + 589)"
    assert answer.locator(".code .bar > span").inner_text() == "python"
    assert answer.locator("li").all_inner_texts() == ["one", "two"]
    assert not answer.locator(".thought").is_visible()
    assert answer.locator("summary").inner_text().startswith("Thought for ")
    answer.locator("summary").click()
    assert answer.locator(".thought").inner_text() == "7 + 9 = 16, carry 1."
    figures = answer.locator(".figures").inner_text()
    assert "tokens/s" in figures and "about" not in figures and "first after" in figures
    assert page.input_value("#model") == "tiny" and not page.locator("#welcome").is_visible()


HOSTILE = (
    "<img src=x onerror=\"alert('img')\"> <script>alert('script')</script>\n\n"
    "[click](javascript:alert('link')) [ok](https://example.org/a) ![x](https://evil.example/p.png)\n\n"
    "```html\n</code></pre><script>alert('code')</script>\n```\n\n"
    "| a | b |\n|---|---|\n| <svg onload=alert(1)> | `<b>` |\n\n# <iframe src='javascript:alert(2)'></iframe>"
)


def test_what_a_model_writes_is_never_markup(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    server = serve_script(f"<think><b onmouseover=alert(3)>hm</b></think>{HOSTILE}")
    page = new_page(server)
    ask(page, "<img src=x onerror=alert(4)>")
    answer = answered(page)
    tags = set(page.eval_on_selector_all("#log *", "nodes => nodes.map(n => n.tagName.toLowerCase())"))
    assert not tags & {"img", "script", "iframe", "b"}
    assert page.eval_on_selector_all("#log svg", "nodes => nodes.every(n => !n.onload)")
    links = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert links == ["https://example.org/a", "https://evil.example/p.png"]
    assert "<img src=x onerror=" in answer.locator(".prose").inner_text()
    assert "</code></pre><script>" in answer.locator("pre code").inner_text()
    assert page.locator(".turn.user .bubble").inner_text() == "<img src=x onerror=alert(4)>"


def playwright_error() -> type[Exception]:
    """Imported late: without playwright these tests are skipped, not broken."""
    from playwright.sync_api import Error

    return Error


def test_the_policy_forbids_scripts_and_markup(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    page = new_page(serve_script())
    attempts = {
        "markup": "() => { document.body.innerHTML = '<p>changed</p>'; }",
        "handler": "() => { document.body.setAttribute('onclick', 'document.title = 1'); document.body.click(); }",
        "script": "() => { Object.assign(document.createElement('script'), {text: 'alert(1)'}); }",
    }
    for name, attempt in attempts.items():
        with pytest.raises(playwright_error(), match="Trusted"):
            page.evaluate(attempt)
        assert page.locator("#welcome").count() == 1, name
    assert page.title() == "deepwright"
    # The attempts were reported, which here is what was wanted.
    assert len(page.complaints) >= 3 and all("Trusted" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_stop_keeps_what_was_said_and_frees_the_engine(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("word " * 2000)
    server.engine.script = lambda prompt: server.served.tokenizer.encode("word " * 60_000)
    server.served.context = 1 << 20
    page = new_page(server)
    page.click("#open-settings")
    page.fill("#max-tokens", "900000")
    page.keyboard.press("Escape")
    ask(page)
    page.wait_for_function("() => document.querySelector('.prose').textContent.includes('word')")
    page.keyboard.press("Escape")
    answer = answered(page)
    assert "stopped" in answer.locator(".figures").inner_text() and answer.locator(".prose").inner_text()
    server.until_idle()
    assert server.engine.cancelled == [0]


def test_regenerate_asks_the_same_again(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    server = serve_script("Hello.")
    page = new_page(server)
    ask(page, "one")
    answered(page)
    ask(page, "two")
    answered(page, 2)
    assert page.locator(".again").count() == 1
    page.click(".again")
    page.wait_for_function("() => document.querySelector('.again') && !document.body.classList.contains('busy')")
    prompts = [prompt for prompt, _, _ in server.engine.asked]
    assert len(prompts) == 3 and prompts[1] == prompts[2] != prompts[0]
    assert page.locator(".turn").count() == 4


def test_conversation_and_controls_survive_a_reload(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script(ANSWER)
    page = new_page(server)
    page.check("[name=thinking][value=disabled]")
    page.click("#open-settings")
    page.fill("#max-tokens", "77")
    page.fill("#temperature", "0.25")
    page.fill("#system", "Be brief.")
    page.select_option("#theme", "dark")
    page.click("#settings .done")
    ask(page)
    answered(page)
    page.reload()
    assert answered(page).locator("strong").inner_text() == "936"
    assert page.locator("html").get_attribute("data-theme") == "dark"
    ask(page, "Again?")
    answered(page, 2)
    prompt, params, _ = server.engine.asked[-1]
    tokenizer = server.served.tokenizer
    assert (params.max_tokens, params.temperature) == (77, 0.25)
    assert prompt[-2:] == [tokenizer.think_start_id, tokenizer.think_end_id]
    text = tokenizer.decode(prompt)
    assert text.startswith("Be brief.") and "936" in text and "carry" not in text
    page.keyboard.press("Alt+n")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    assert page.locator("#list .open").all_inner_texts() == ["What is 347 + 589?"]


def test_keys_write_lines_and_find_the_composer(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    page = new_page(serve_script("Hello."))
    page.locator("#question").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo" and page.locator(".turn").count() == 0
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".turn.user .bubble").inner_text() == "one\ntwo"


def test_errors_are_shown_and_can_be_tried_again(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    server = serve_script("Hello.")
    page = new_page(server)
    server.engine.fail = 1
    ask(page)
    assert "on fire" in answered(page).locator(".problem").inner_text()
    page.click(".again")
    page.wait_for_function("() => document.querySelector('.prose').textContent === 'Hello.'")
    assert page.locator(".problem").is_hidden()


def test_a_key_is_asked_for_and_used(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    page = new_page(serve_script("Hello.", keys=["a-key-that-is-long-enough"]))
    ask(page)
    assert "API key" in answered(page).locator(".problem").inner_text()
    page.click("#open-settings")
    page.fill("#key", "a-key-that-is-long-enough")
    page.click("#settings .done")
    page.click(".again")
    page.wait_for_function("() => document.querySelector('.prose').textContent === 'Hello.'")
    assert page.evaluate("JSON.stringify(localStorage).includes('a-key-that')") is False
    # The refused requests are logged by the browser itself.
    assert page.complaints and all("401" in complaint for complaint in page.complaints)
    page.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 860)])
def test_it_fits_and_can_be_read(
    serve_script: Callable[..., Any], new_page: Callable[..., Any], width: int, height: int, scheme: str
) -> None:
    long_line = "x" * 300
    server = serve_script(f"{long_line}\n\n```\n{long_line}\n```\n\n| {' | '.join('abcdefgh')} |\n{'|---' * 8}|\n")
    server.served.context = 4096
    page = new_page(server, viewport={"width": width, "height": height}, color_scheme=scheme)
    ask(page, long_line)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && scrollX === 0")
    assert page.evaluate("document.getElementById('scroller').scrollWidth <= innerWidth")
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    # WCAG's contrast of text on its background, 4.5 or more.
    ratio = page.evaluate(
        """() => {
            const luminance = (color) => {
                const parts = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
                const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const contrast = (a, b) => {
                const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
                return (high + 0.05) / (low + 0.05);
            };
            const style = (selector) => getComputedStyle(document.querySelector(selector));
            return Math.min(
                contrast(style('.prose').color, style('body').backgroundColor),
                contrast(style('.figures').color, style('body').backgroundColor),
                contrast(style('.turn.user .bubble').color, style('.turn.user .bubble').backgroundColor),
                contrast(style('.segments legend').color, style('.segments').backgroundColor));
        }"""
    )
    assert ratio >= 4.5
