"""What the page sends and shows beside the text: sampling, budgets, models, functions, figures, keys, focus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deepwright_serve.protocol import Prices

from .conftest import answered, ask

pytestmark = pytest.mark.browser


def requests(page: Any) -> list[dict[str, Any]]:
    """The bodies that the page posts from now on."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    return sent


def test_sampling_and_budget_are_sent_and_wrong_values_are_not(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    page = new_page(serve_script("Hello."))
    sent = requests(page)
    values = {
        "temperature": 0.3, "top-p": 0.9, "top-k": 40, "min-p": 0.05, "presence": 0.5, "frequency": -0.5,
        "repetition": 1.1, "seed": 7, "max-tokens": 50,
    }  # fmt: skip
    page.keyboard.press("Alt+s")
    for field, value in values.items():
        page.fill(f"#{field}", str(value))
    page.keyboard.press("Escape")
    page.fill("#budget", "12")
    ask(page)
    answered(page)
    names = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
    body = sent[0]
    assert [body[name] for name in [*names, "seed", "max_tokens"]] == list(values.values())
    assert body["thinking"] == {"type": "auto", "budget_tokens": 12} and body["stream_options"]["include_usage"]
    page.check("[name=thinking][value=disabled]")
    assert page.locator("#budget").is_hidden()
    page.click("#open-settings")
    page.fill("#temperature", "9")
    assert page.locator("#temperature").get_attribute("aria-invalid") == "true"
    page.keyboard.press("Escape")
    ask(page, "again")
    answered(page, 2)
    assert "temperature" not in sent[1] and sent[1]["thinking"] == {"type": "disabled"}
    page.click("#open-settings")
    page.click("#defaults")
    assert page.input_value("#top-p") == "" and page.input_value("#seed") == ""
    page.keyboard.press("Escape")
    ask(page, "and again")
    answered(page, 3)
    assert not {*names, "seed", "max_tokens"} & set(sent[2])


def test_the_model_is_chosen_and_remembered(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    server = serve_script("Hello.")
    first = server.service.roster.models()[0]
    poet = type(first)("poet", first.thread, first.tokenizer, first.context, adapter="poet")
    server.service.roster.replace(poet)
    page = new_page(server)
    sent = requests(page)
    page.wait_for_function("() => document.getElementById('model').options.length === 2")
    assert page.locator("#model option").all_inner_texts() == ["tiny", "poet (on tiny)"]
    page.select_option("#model", "poet")
    page.reload()
    page.wait_for_function("() => document.getElementById('model').value === 'poet'")
    ask(page)
    assert answered(page).locator(".figures").get_attribute("title") == "by poet"
    assert sent[0]["model"] == "poet"


def test_cost_and_speed_are_shown_and_kept(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    server = serve_script("Hello there.")
    server.service.prices = Prices(input=1000, output=2000)
    page = new_page(server)
    ask(page)
    figures = answered(page).locator(".figures").inner_text()
    assert "tokens/s" in figures and "cost 0.0" in figures
    page.reload()
    assert answered(page).locator(".figures").inner_text() == figures


def test_calls_are_shown_and_answered(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    page = new_page(serve_script("Hello."))
    sent: list[dict[str, Any]] = []
    pieces = [
        '{"role":"assistant","tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"add","arguments":""}}]}',
        '{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\": 1,"}}]}',
        '{"tool_calls":[{"index":0,"function":{"arguments":" \\"b\\": \\"<b>2</b>\\"}"}}]}',
    ]
    events = "".join(f'data: {{"choices":[{{"index":0,"delta":{piece}}}]}}\n\n' for piece in pieces)

    def answer(route: Any) -> None:
        sent.append(route.request.post_data_json)
        said = events if len(sent) == 1 else 'data: {"choices":[{"index":0,"delta":{"content":"It is 3."}}]}\n\n'
        route.fulfill(status=200, content_type="text/event-stream", body=f"{said}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    page.click("#open-settings")
    page.fill("#tools", "[{")
    assert "no JSON" in page.locator("#tools-wrong").inner_text()
    page.fill("#tools", '[{"type": "function", "function": {"name": "add"}}]')
    page.keyboard.press("Escape")
    ask(page, "1 + 2?")
    shown = answered(page)
    assert (
        shown.locator(".call b").inner_text() == "add" and '"b": "<b>2</b>"' in shown.locator(".call pre").inner_text()
    )
    shown.locator("textarea").fill("3")
    shown.locator("text=Send results").click()
    assert answered(page, 2).locator(".prose").inner_text() == "It is 3."
    assert sent[0]["tools"][0]["function"]["name"] == "add"
    user, calls, result = sent[1]["messages"]
    assert user["role"] == "user" and calls["tool_calls"][0]["function"]["arguments"] == '{"a": 1, "b": "<b>2</b>"}'
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    page.reload()
    assert page.locator(".call").count() == 2 and page.locator(".results").count() == 0


def test_the_documented_keys_work(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    server = serve_script("<think>hm</think>Hello.")
    page = new_page(server)
    ask(page)
    answered(page)
    page.keyboard.press("Alt+t")
    assert page.locator(".thought").is_visible()
    page.keyboard.press("Alt+r")
    page.wait_for_function("() => document.querySelector('.place')?.textContent === '2 / 2'")
    page.keyboard.press("Alt+c")
    assert page.locator("#side").is_hidden()
    page.keyboard.press("Alt+c")
    assert page.locator("#side").is_visible()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    told = set(page.locator("#keys kbd").all_inner_texts())
    assert {"Alt", "R", "T", "N", "C", "S", "/", "Esc", "?"} <= told
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+n")
    assert page.evaluate("document.activeElement.id") == "question" and page.locator("#welcome").is_visible()


def test_focus_goes_through_the_page_in_order_and_everything_has_a_name(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    page = new_page(serve_script("Hello."))
    ask(page)
    answered(page)
    page.evaluate("document.activeElement.blur()")
    order = []
    for _ in range(24):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    places = [order.index(name) for name in ("skip", "new", "toggle", "model", "open-settings", "question")]
    assert places == sorted(places), order
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([hidden]), select, textarea')].filter((node) =>
            !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#log").get_attribute("aria-live") == "polite"


def test_the_list_is_a_drawer_on_a_phone(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> None:
    page = new_page(serve_script("Hello."), viewport={"width": 360, "height": 740})
    assert page.locator("#side").is_hidden()
    page.click("#toggle")
    assert page.locator("#side").is_visible() and page.locator("#toggle").get_attribute("aria-expanded") == "true"
    page.locator("#shade").click(position={"x": 350, "y": 300})
    assert page.locator("#side").is_hidden()
    page.click("#open-settings")
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] >= 0 and box["y"] + box["height"] <= 740


@pytest.mark.parametrize(("status", "words"), [(429, "Slow down. (It asks for 7 s of patience.)"), (502, "status 502")])
def test_refusals_are_sentences(
    serve_script: Callable[..., Any], new_page: Callable[..., Any], status: int, words: str
) -> None:
    page = new_page(serve_script("Hello."))
    body = '{"error": {"message": "Slow down."}}' if status == 429 else "<html>bad gateway</html>"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=status, headers={"retry-after": "7"}, body=body)
    )
    ask(page)
    assert words in answered(page).locator(".problem").inner_text()
    page.unroute("**/v1/chat/completions")
    page.click(".again")
    page.wait_for_function("() => document.querySelector('.prose').textContent === 'Hello.'")
    assert page.locator(".problem").is_hidden() and page.locator(".turn").count() == 2
    page.complaints.clear()


def test_a_model_that_is_gone_gives_way_to_one_that_is_there(
    serve_script: Callable[..., Any], new_page: Callable[..., Any]
) -> None:
    page = new_page(serve_script("Hello."))
    page.wait_for_selector("#model:visible")
    page.evaluate("() => { models.cards = [{ id: 'old' }]; state.settings.model = 'old'; drawModels(); }")
    ask(page)
    assert "There is no model 'old'" in answered(page).locator(".problem").inner_text()
    page.wait_for_function("() => document.getElementById('model').value === 'tiny'")
    page.click(".again")
    page.wait_for_function("() => document.querySelector('.prose').textContent === 'Hello.'")
    assert page.complaints and all("404" in complaint for complaint in page.complaints)
    page.complaints.clear()
