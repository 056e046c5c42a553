"""`deepwright model`: the names, a model's figures as a page and as JSON, and every way to ask wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse
from flows import cli, compose

NAMES = [
    "kimi_k2",
    "llama3_405b",
    "mini",
    "moonlight_16b_a3b",
    "qwen2_5_72b",
    "tiny",
    "tiny_dense",
    "v2",
    "v2_lite",
    "v3",
]
Captured = pytest.CaptureFixture[str]


def said(capsys: Captured, *arguments: str, status: int = 0) -> str:
    """What a command prints: on standard output when it is right, on the other when it is not."""
    assert cli.call(["model", *arguments]) == status
    out, err = capsys.readouterr()
    assert (out if status else err) == ""
    return err if status else out


def test_every_model_is_listed_with_a_sentence(capsys: Captured) -> None:
    lines = said(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert [each["name"] for each in json.loads(said(capsys, "list", "--json"))] == NAMES


def test_the_page_of_v3(capsys: Captured) -> None:
    page = said(capsys, "show", "v3")
    for figure in (
        "671,026,404,352",
        "37,552,282,624",
        "684.49 B",  # as checkpoints count
        "11.61 B",  # multi-token prediction
        "653.91 B",  # routed experts
        "70,272 B",
        "3,997,696 B",
        "249,856 B",
        "18 bytes a parameter",
        "context 4,096",
    ):
        assert figure in page, figure
    assert "\x1b" not in page  # no terminal, no emphasis
    assert max(map(len, page.splitlines())) <= 120
    assert all(line == line.rstrip() for line in page.splitlines())


def test_a_dense_model_has_no_experts_on_its_page(capsys: Captured) -> None:
    page = said(capsys, "show", "qwen2_5_72b")
    assert "expert" not in page.lower().replace("feed-forward and experts in e4m3", "") and "multi-token" not in page
    assert "all of them work for a token" in page


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_of_each(capsys: Captured, name: str) -> None:
    figures = json.loads(said(capsys, "show", name, "--json"))
    assert figures["model"] == name
    assert figures["parameters_total"] == sum(part["total"] for part in figures["parts"].values())
    assert figures["parameters_active"] == sum(part["active"] for part in figures["parts"].values())
    assert figures["vocab_size"] > 0
    assert figures["kv_bytes_per_token"] <= figures["kv_bytes_per_token_gqa"] <= figures["kv_bytes_per_token_mha"]
    assert figures["context"] == min(4096, figures["max_positions"])


def test_overrides_and_context_change_the_figures(capsys: Captured) -> None:
    usual = json.loads(said(capsys, "show", "v3", "--json"))
    other = json.loads(said(capsys, "show", "v3", "model/ffn=v2_moe", "--context", "163840", "--json"))
    assert other["experts"]["routed"] == 160 and other["parameters_total"] < usual["parameters_total"]
    assert other["flops_per_token_decode"] > usual["flops_per_token_decode"]
    assert other["memory"]["inference"]["bf16"]["cache"] == 163840 * 70272
    grown = json.loads(said(capsys, "show", "mini", "tokenizer.vocab_size=8192", "--json"))
    assert grown["vocab_size"] == 8192


def test_a_directory(capsys: Captured, tmp_path: Path) -> None:
    plugins = installed()
    section = compose.compose(["model=tiny_dense", "model.vocab_size=300"], plugins)["model"]
    model = build_model(plugins.registry, parse(ModelConfig, section, "model", plugins.registry), seed=0)
    save_model(model, tmp_path / "model")
    want = sum(parameter.numel() for parameter in model.parameters())
    for path in (tmp_path, tmp_path / "model"):
        assert json.loads(said(capsys, "show", str(path), "--json"))["parameters_total"] == want
    assert "is a directory" in said(capsys, "show", str(tmp_path), "model.layers=2", status=2)
    (tmp_path / "nothing").mkdir()
    assert "holds no model" in said(capsys, "show", str(tmp_path / "nothing"), status=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["Which model? Name one of: kimi_k2,", "v3."]),
        (["v33"], ["model=v33: there is no such option. Did you mean v3", "llama3_405b"]),
        (["v3", "--context", "0"], ["context is 0; expected between 1 and model.max_positions, which is 163840."]),
        (["tiny", "--context", "513"], ["context is 513; expected between 1 and", "which is 512."]),
        (["v3", "v2"], ["'v2' has no value"]),
        (["v3", "model.ffn.experts=250"], ["experts is 250; expected a multiple of router.groups, which is 8"]),
        (["v3", "model.ffn.top_k=300"], ["top_k is 300; expected at most experts, which is 256"]),
        (["v3", "model.laiers=3"], ["Did you mean model.layers?"]),
        (["v3", "model/ffn=nope"], ["model/ffn=nope: there is no such option.", "v3_moe"]),
        (["v3", "+model.rope.llama3={}"], ["model.rope: yarn and llama3 are both given"]),
        (["v3", "--block", "mla"], ["model/attention/v3_mla needs model/attention/mla", "--block"]),
    ],
)
def test_wrong_requests_are_sentences(capsys: Captured, arguments: list[str], says: list[str]) -> None:
    text = said(capsys, "show", *arguments, status=2)
    for part in says:
        assert part in text
    assert all(line.startswith("deepwright: ") for line in text.splitlines())


def test_a_context_that_is_no_number(capsys: Captured) -> None:
    assert "'abc' is not a valid integer" in said(capsys, "show", "v3", "--context", "abc", status=2)
