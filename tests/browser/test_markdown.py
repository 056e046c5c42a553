"""Markdown from a model: what it becomes, and texts that are made to hurt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.browser

RENDER = "text => { const shown = prose(); shown.draw(text); return shown.node.innerHTML; }"


@pytest.fixture
def page(serve_script: Callable[..., Any], new_page: Callable[..., Any]) -> Any:
    return new_page(serve_script())


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**a *b* `c`**", "<p><strong>a <em>b</em> <code>c</code></strong></p>"),
        ("2 * 3 * 4, a_b_c, 5*6*7", "<p>2 * 3 * 4, a_b_c, 5*6*7</p>"),
        ("**open `tick", "<p>**open `tick</p>"),
        ("``a ` b``", "<p><code>a ` b</code></p>"),
        ("~~no~~ yes", "<p><s>no</s> yes</p>"),
        ("# A #\n## B", "<h1>A</h1><h2>B</h2>"),
        ("####### seven", "<p>####### seven</p>"),
        ("a\nb", "<p>a<br>b</p>"),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("---", "<hr>"),
        ("a | b\n--|--\n1 | 2", "<th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td>"),
        ("see https://example.org/a(b).", 'href="https://example.org/a"'),
        ("[a](https://example.org/?q=1&r=2)", 'href="https://example.org/?q=1&amp;r=2"'),
    ],
)  # fmt: skip
def test_markdown(page: Any, text: str, html: str) -> None:
    got = page.evaluate(RENDER, text)
    # A piece of the whole where the whole would hide what is meant.
    assert html in got if html.startswith(("<th>", "href")) else html == got


NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [d](//evil.example)",
    "[c](data:text/html,<script>alert(1)</script>)",
    "[a](https://ok.example\" onclick=\"alert(1)) <https://ok.example onmouseover=alert(1)>",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "```html\n</code></pre><script>alert(1)</script>\n```",
    "| <svg onload=alert(1)> |\n|---|\n| <iframe srcdoc='<script>alert(1)</script>'> |",
    "# <style>*{display:none}</style>\n- <base href=//evil.example>\n> <form action=//evil.example>",
    "**<b onclick=alert(1)>** `<i>` ~~<object data=x>~~",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#106;avascript:",
]  # fmt: skip


def test_nothing_that_a_model_writes_becomes_markup(page: Any) -> None:
    seen = page.evaluate(
        """texts => texts.map((text) => {
            const shown = prose();
            shown.draw(text);
            document.getElementById('log').append(shown.node);
            const nodes = [...shown.node.querySelectorAll('*')];
            return {
                tags: nodes.map((node) => node.localName),
                attributes: nodes.flatMap((node) => [...node.attributes].map((one) => `${one.name}=${one.value}`)),
            };
        })""",
        NASTY,
    )
    allowed = {"p", "br", "a", "code", "pre", "div", "span", "button", "table", "thead", "tbody", "tr", "th", "td"}
    allowed |= {"h1", "h2", "h3", "h4", "ul", "ol", "li", "blockquote", "strong", "em", "s", "hr"}
    for each in seen:
        assert set(each["tags"]) <= allowed
        for attribute in each["attributes"]:
            name, _, value = attribute.partition("=")
            assert name in {"class", "type", "tabindex", "target", "rel", "href", "start"}, attribute
            assert name != "href" or value.startswith(("https://ok.example", "http://")), attribute
    page.wait_for_timeout(50)


LONG = 100_000


@pytest.mark.parametrize(
    "text",
    [
        "x" * LONG,
        "**a " * (LONG // 4),
        "*a" * (LONG // 2),
        "`" * LONG,
        "` `` " * (LONG // 5),
        "[" * LONG,
        "[a](" * (LONG // 4),
        "~~a" * (LONG // 3),
        "https://" * (LONG // 8),
        "# " + "a #" * (LONG // 3),
        "-" * LONG + "x",
        "| " * (LONG // 2) + "\n" + "|-" * (LONG // 2),
        "a|b\n" + "-|" * (LONG // 2) + "x",
        ">" * LONG,
        "\n".join(" " * 2 * depth + "- a" for depth in range(300)),
        "> " * 2000 + "deep",
        "- " * (LONG // 2),
        " " * LONG + "x",
        "```\n" * (LONG // 4),
        "\n" * LONG,
    ],
    ids=lambda text: repr(text[:8]),
)
def test_no_text_holds_up_the_page(page: Any, text: str) -> None:
    """Measured in the browser; the bound is far above what it takes, and far below what a quadratic look takes."""
    took = page.evaluate(
        """text => {
            const began = performance.now();
            prose().draw(text);
            return performance.now() - began;
        }""",
        text,
    )
    assert took < 4000


def test_a_long_list_is_not_made_again_for_every_item(page: Any) -> None:
    """Most of what is shown stays the same nodes, and together they look like one list."""
    kept = page.evaluate(
        """() => {
            const counts = {};
            for (const [name, item] of [["ul", (n) => `- item ${n}\n  - inner\n`], ["ol", (n) => `${n}. item\n`]]) {
                const text = [...Array(1000).keys()].map((n) => item(n + 1)).join("");
                const grown = prose(), whole = prose();
                grown.draw(text);
                const before = new Set(grown.node.querySelectorAll("li"));
                grown.draw(text + item(1001));
                whole.draw(text + item(1001));
                const after = [...grown.node.querySelectorAll("li")];
                counts[name] = [
                    after.filter((node) => !before.has(node)).length,
                    grown.node.innerHTML === whole.node.innerHTML,
                    after.length,
                    grown.node.lastChild.start ?? 0,
                ];
            }
            return counts;
        }"""
    )
    assert kept["ul"][0] < 300 and kept["ul"][1:] == [True, 2002, 0]
    assert kept["ol"][0] < 300 and kept["ol"][1:] == [True, 1001, 1001]


def test_a_growing_text_looks_as_if_it_had_come_at_once(page: Any) -> None:
    text = (
        "# Head\n\nSome **bold** and\nmore.\n\n1. one\n2. two\n   - in\n3. three\n\n```py\nx = 1\n\ny = 2\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n> quoted\n> more\n\n- last\n- of\n\nend."
    )
    same = page.evaluate(
        """text => {
            const grown = prose(), whole = prose();
            for (let length = 1; length <= text.length; length += 1) grown.draw(text.slice(0, length));
            whole.draw(text);
            return [grown.node.innerHTML, whole.node.innerHTML];
        }""",
        text,
    )
    assert same[0] == same[1] and "<ol" in same[1] and same[1].count("<ol") == 1
