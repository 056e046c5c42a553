"""The example plugins as a stranger would use them: built, installed with pip, listed, composed, built, trained."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepwright_core.errors import RequestError
from deepwright_core.evaluation import Answered
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import Plugins, discover, load
from deepwright_core.registry import parse
from deepwright_core.tasks import Problem
from deepwright_kernels import linear_cross_entropy

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/pyproject.toml"))
MODULES = ("deepwright_window_attention", "deepwright_brevity_reward")
WINDOW, BLOCK = 4, 4


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples installed in it (no network: the build backend is the installed one)."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(folder), *map(str, EXAMPLES)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def plugins(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    monkeypatch.syspath_prepend(str(site))
    loaded = load(discover())
    assert not loaded.failures
    yield loaded
    for module in MODULES:
        sys.modules.pop(module, None)


def window_model(plugins: Plugins, **attention: int) -> Transformer:
    sizes = {"vocab_size": 32, "hidden_size": 16, "layers": 2, "intermediate_size": 32, "max_positions": 64}
    part = {"name": "window", "heads": 2, "kv_heads": 1, "head_dim": 8, "window": WINDOW, **attention}
    values = {**sizes, "init_std": 0.2, "attention": part, "ffn": {"name": "dense"}}
    return build_model(plugins.registry, parse(ModelConfig, values, "model", plugins.registry), seed=0)


def test_the_command_lists_them_with_their_distributions(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "plugins", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    listed = {(c["kind"], c["name"]): c for c in json.loads(done.stdout)["components"]}
    assert listed["attention", "window"]["distribution"] == "deepwright-window-attention"
    assert listed["attention", "window"]["doc"] == "Sliding-window grouped-query attention."
    assert listed["reward", "brevity"]["distribution"] == "deepwright-brevity-reward"
    assert listed["reward", "brevity"]["version"] == "0.1.0"


def test_hydra_composes_the_attention_by_name(plugins: Plugins) -> None:
    from flows.compose import compose, group_options

    assert {"gqa", "window"} <= set(group_options("model/attention", plugins))
    composed = compose(["model/attention=window", "model.attention.window=64"], plugins)
    attention = composed["model"]["attention"]
    assert (attention["name"], attention["window"], attention["full_every"]) == ("window", 64, 0)


def test_a_model_with_the_attention_learns(plugins: Plugins) -> None:
    model = window_model(plugins)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens_BS = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        hidden_BSD = model(tokens_BS[:, :-1])
        loss_T, _ = linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head.weight, tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss_T.mean().backward()
        optimizer.step()
        losses.append(loss_T.mean().item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("full_every", "reach"), [(0, 2 * (WINDOW - 1)), (2, 15)])
def test_a_token_is_heard_as_far_as_the_windows_reach(plugins: Plugins, full_every: int, reach: int) -> None:
    model = window_model(plugins, full_every=full_every)
    tokens_BS = torch.arange(16)[None]
    changed_BS = tokens_BS.clone()
    changed_BS[0, 0] = 31
    moved_S = (model(tokens_BS) - model(changed_BS)).abs().amax(-1)[0] > 1e-6
    assert moved_S.nonzero().max() == reach


def test_packed_documents_do_not_hear_each_other(plugins: Plugins) -> None:
    model = window_model(plugins)
    tokens_BS, segments_BS = torch.arange(10)[None], torch.tensor([[0] * 5 + [1] * 5])
    changed_BS = tokens_BS.clone()
    changed_BS[0, 4] = 31
    moved_S = (model(tokens_BS, segments_BS) - model(changed_BS, segments_BS)).abs().amax(-1)[0] > 1e-6
    assert moved_S.nonzero().flatten().tolist() == [4]


def test_decoding_equals_training_form(plugins: Plugins) -> None:
    model = window_model(plugins).eval()
    tokens_BS = torch.randint(32, (1, 11), generator=torch.Generator().manual_seed(1))
    cache = [torch.zeros(5 * BLOCK, width) for width in model.cache_widths]
    hidden = []
    with torch.no_grad():
        for start, end in [(0, 6), (6, 7), (7, 8), (8, 11)]:
            positions_BQ = torch.arange(start, end)[None]
            # Blocks 1, 2, 3 in order: the slot of a position is one block further than the position.
            batch = CacheBatch(
                positions_BQ, positions_BQ + BLOCK, torch.tensor([[1, 2, 3]]), torch.tensor([end]), BLOCK
            )
            hidden.append(model.extend(tokens_BS[:, start:end], cache, batch))
        torch.testing.assert_close(torch.cat(hidden, 1), model(tokens_BS), rtol=1e-4, atol=1e-5)


def test_wrong_options_of_the_attention_are_refused(plugins: Plugins) -> None:
    with pytest.raises(RequestError) as refused:
        plugins.registry.parse("attention", {"name": "window", "window": 0, "windo": 3}, "model.attention")
    text = str(refused.value)
    assert "model.attention.window is 0" in text
    assert "model.attention.windo is not an option of WindowConfig. Did you mean window" in text


def test_the_reward_pays_for_short_right_answers_only(plugins: Plugins) -> None:
    from deepwright_rl.reward import build_rewards

    rewards = build_rewards(plugins.registry, {"short": {"name": "brevity", "weight": 0.5, "limit": 10}})
    weight, reward = rewards["short"]

    def sample(tokens: int, correct: bool) -> Answered:
        problem = Problem(id="0", task="sum", question="1 + 1", answer="2", metadata={}, worked="")
        return Answered(problem, list(range(tokens)), None, "2", True, correct, 0)

    assert weight == 0.5
    assert [reward(sample(tokens, True)) for tokens in (0, 5, 10, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert reward(sample(1, False)) == 0.0


def test_the_readme_says_how_to_compose_the_reward(plugins: Plugins) -> None:
    from flows.compose import compose

    readme = (ROOT / "examples/deepwright-brevity-reward/README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("deepwright run rl")]
    composed = compose([line.split("'")[1]], plugins)
    brevity = composed["rl"]["rewards"]["brevity"]
    assert plugins.registry.parse("reward", brevity, "rl.rewards.brevity").limit == 200
    assert "correctness" in {reward["name"] for reward in composed["rl"]["rewards"].values()}
