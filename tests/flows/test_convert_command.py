"""`deepwright convert` as people type it: a DeepSeek-V3 out and in again, and every kind of bad input."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepwright_core.huggingface.conversion import partial_directory
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse
from deepwright_core.tokenizer import bpe
from flows import cli

CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "layers": 3,
    "intermediate_size": 80,
    "first_dense_layers": 1,
    "max_positions": 256,
    "init_std": 0.1,
    "mtp": {"depth": 1},
    "rope": {"theta": 10000.0, "yarn": {"factor": 4.0, "original_positions": 64}},
    "attention": {
        "name": "mla",
        "heads": 3,
        "q_lora_rank": 40,
        "kv_lora_rank": 136,  # with 8 more for the rope key: rows of a partial FP8 block
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "ffn": {
        "name": "moe",
        "experts": 8,
        "top_k": 3,
        "shared_experts": 2,
        "intermediate_size": 16,
        "router": {"name": "noaux_tc", "groups": 4, "top_groups": 2, "scaling": 2.5},
    },
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 of ours with tokenizer and a bias that is not zero."""
    directory = tmp_path_factory.mktemp("ours") / "model"
    model = build_model(installed().registry, parse(ModelConfig, CONFIG, "model", installed().registry), seed=0)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(len(name)))
    save_model(model, directory)
    bpe.train(bpe.BpeConfig(vocab_size=300), ["some text to learn from, and some more text"] * 20).save(directory)
    return directory


@pytest.fixture(scope="module")
def published(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as others publish it, in several files."""
    directory = tmp_path_factory.mktemp("published") / "model"
    assert cli.call(["convert", "export", str(ours), str(directory), "--shard-gb", "0.0003"]) == 0
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def test_out_and_in_again(ours: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in published.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"chat_template.jinja", "model.safetensors.index.json"}
    config = json.loads((published / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert config["num_nextn_predict_layers"] == 1 and config["rope_interleave"] is True
    assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == "yarn"
    assert config["eos_token_id"] == json.loads((published / "generation_config.json").read_text())["eos_token_id"]
    stored = weights(published)
    assert torch.equal(stored["model.layers.3.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["model.layers.3.shared_head.head.weight"], stored["lm_head.weight"])

    capsys.readouterr()
    assert cli.call(["convert", "import", str(published), str(tmp_path / "again"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "deepseek_v3" and report["dtypes"] == {"F32": len(weights(ours))}
    assert same(ours, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    first, second = (load_model(directory, installed().registry) for directory in (ours, tmp_path / "again"))
    tokens = torch.arange(60).view(2, 30)
    assert torch.equal(first.logits(first(tokens)), second.logits(second(tokens)))


def test_what_generation_needs_is_filled_in(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(ours, tmp_path / "ours")
    (tmp_path / "ours" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    assert cli.call(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    written = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [7, 9], "pad_token_id": 2, "temperature": 0.6}


def test_bfloat16_is_exact_and_the_bias_stays_float32(ours: Path, tmp_path: Path) -> None:
    for command in (
        ["export", str(ours), "bf16", "--dtype", "bf16"],
        ["import", "bf16", "in"],
        ["export", "in", "out"],
    ):
        arguments = [str(tmp_path / part) if part in ("bf16", "in", "out") else part for part in command[:3]]
        if command[-1] == "bf16" and "--dtype" in command:
            arguments += ["--dtype", "bf16"]
        assert cli.call(["convert", *arguments]) == 0
    assert same(tmp_path / "bf16", tmp_path / "out")
    kinds = {name: tensor.dtype for name, tensor in weights(tmp_path / "bf16").items()}
    biases = [name for name in kinds if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(kinds[name] == torch.float32 for name in biases)
    assert {kind for name, kind in kinds.items() if name not in biases} == {torch.bfloat16}


def test_fp8_stores_matrices_alone(ours: Path, tmp_path: Path) -> None:
    assert cli.call(["convert", "export", str(ours), str(tmp_path / "fp8"), "--dtype", "fp8"]) == 0
    stored = weights(tmp_path / "fp8")
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {f"{name}_scale_inv" for name in quantised} == {name for name in stored if name.endswith("_scale_inv")}
    assert all(".self_attn." in name or ".mlp." in name for name in quantised)
    high = ("norm", "embed_tokens", "head.", "mlp.gate.", "eh_proj")
    assert not any(part in name for name in quantised for part in high)
    latent = stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert latent.shape == (math.ceil(144 / 128), 1)
    assert cli.call(["convert", "import", str(tmp_path / "fp8"), str(tmp_path / "in")]) == 0
    read = weights(tmp_path / "in")
    assert {t.dtype for n, t in read.items() if not n.endswith("bias_E")} == {torch.bfloat16}
    for name in (
        "layers.1.attention.kv_a.weight",
        "layers.2.ffn.experts.gate_up_EID",
        "mtp.0.block.ffn.shared.up.weight",
    ):
        original = weights(ours)[name]
        assert (read[name].float() - original).abs().max() <= original.abs().max() / 16  # half a step of e4m3 at most


def test_multi_token_prediction_can_be_left_out(published: Path, ours: Path, tmp_path: Path) -> None:
    assert cli.call(["convert", "import", str(published), str(tmp_path / "in"), "--without-mtp"]) == 0
    assert weights(tmp_path / "in").keys() == {name for name in weights(ours) if not name.startswith("mtp.")}
    assert cli.call(["convert", "export", str(ours), str(tmp_path / "out"), "--without-mtp"]) == 0
    assert not any(name.startswith("model.layers.3.") for name in weights(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_dry_run_reads_headers_only(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["convert", "import", str(published), str(tmp_path / "in"), "--dry-run"]) == 0
    assert "Every tensor fits. Nothing was written." in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_text(json.dumps(document))

    return apply


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change tensors of the first file, and the index with them."""

    def apply(directory: Path) -> None:
        path = sorted(directory.glob("*.safetensors"))[0]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index = directory / "model.safetensors.index.json"
        document = json.loads(index.read_text())
        kept = {name: file for name, file in document["weight_map"].items() if file != path.name}
        document["weight_map"] = kept | dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(document))

    return apply


def first_file(act: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda directory: act(sorted(directory.glob("*.safetensors"))[0])


def replace(tensors: dict[str, torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = value(tensors[name])


def repeated(directory: Path) -> None:
    """The MTP module's copy of the embedding is another one."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.3.embed_tokens.weight" in tensors:
            tensors["model.layers.3.embed_tokens.weight"][5, 5] += 1
            save_file(tensors, path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("BOOM",)


CONFIG_FILE, INDEX_FILE = "config.json", "model.safetensors.index.json"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated file": (first_file(lambda p: p.write_bytes(p.read_bytes()[:-9])), "is it truncated?"),
    "an empty file": (first_file(lambda p: p.write_bytes(b"")), "cannot be read as safetensors"),
    "a pickle under the file's name": (first_file(lambda p: p.write_bytes(pickle.dumps(Bomb()))), "cannot be read"),
    "a file that is gone": (first_file(lambda p: p.unlink()), "does not exist"),
    "no index": (lambda d: (d / INDEX_FILE).unlink(), "model.safetensors.index.json is missing"),
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], "has no weights"),
    "pickled weights": (
        lambda d: [[p.unlink() for p in d.glob("model*")], (d / "pytorch_model.bin").write_bytes(b"x")],
        "pickled weights",
    ),
    "an index that is no JSON": (lambda d: (d / INDEX_FILE).write_text("{"), "is not valid JSON"),
    "an index without a map": (lambda d: (d / INDEX_FILE).write_text("{}"), "has no weight_map"),
    "an index that leads out": (
        edit(INDEX_FILE, lambda x: x["weight_map"].update({"lm_head.weight": "../../../etc/passwd"})),
        "names the file '../../../etc/passwd'; expected the plain name",
    ),
    "an index with an absolute path": (
        edit(INDEX_FILE, lambda x: x["weight_map"].update({"lm_head.weight": "/tmp/model.safetensors"})),
        "names the file '/tmp/model.safetensors'",
    ),
    "an index that promises more": (
        edit(INDEX_FILE, lambda x: x["weight_map"].update({"more": sorted(x["weight_map"].values())[0]})),
        "says that 'more' is in",
    ),
    "a tensor of integers": (rewrite(lambda t: replace(t, lambda x: x.long())), "has dtype I64; expected one of F32"),
    "a tensor of another shape": (rewrite(lambda t: replace(t, lambda x: x[:1])), "the config wants"),
    "a tensor too few": (rewrite(lambda t: t.pop(sorted(t)[0])), "is missing"),
    "a tensor too many": (rewrite(lambda t: t.update(stranger=torch.zeros(2))), "'stranger' has no place in the model"),
    "a scale of nothing": (
        rewrite(lambda t: t.update({"lm_head.weight_scale_inv": torch.zeros(2, 2)})),
        "is the scale of no FP8 weight",
    ),
    "FP8 without its scale": (
        rewrite(lambda t: replace(t, lambda x: x.to(torch.float8_e4m3fn))),
        "is FP8 and",
    ),
    "a copy that differs": (repeated, "'model.layers.3.embed_tokens.weight' differs from 'model.embed_tokens.weight'"),
    "no config": (lambda d: (d / CONFIG_FILE).unlink(), "has no config.json"),
    "a config that is no JSON": (lambda d: (d / CONFIG_FILE).write_text("?"), "is not valid JSON"),
    "a config that is a list": (lambda d: (d / CONFIG_FILE).write_text("[]"), "holds a list; expected a mapping"),
    "an unknown model": (
        edit(CONFIG_FILE, lambda x: x.update(model_type="gpt5")),
        "model_type is 'gpt5'; expected one of",
    ),
    "no model_type": (edit(CONFIG_FILE, lambda x: x.pop("model_type")), "model_type is None"),
    "a missing size": (edit(CONFIG_FILE, lambda x: x.pop("kv_lora_rank")), "kv_lora_rank is missing"),
    "a size of the wrong type": (edit(CONFIG_FILE, lambda x: x.update(hidden_size="48")), "hidden_size is '48'"),
    "a negative size": (edit(CONFIG_FILE, lambda x: x.update(num_hidden_layers=-1)), "num_hidden_layers is -1"),
    "a billion layers": (
        edit(CONFIG_FILE, lambda x: x.update(num_hidden_layers=10**9)),
        "num_hidden_layers is 1,000,000,000, but the files hold",
    ),
    "a billion experts": (edit(CONFIG_FILE, lambda x: x.update(n_routed_experts=10**9)), "from 1 to 8,192"),
    "biases in attention": (
        edit(CONFIG_FILE, lambda x: x.update(attention_bias=True)),
        "attention_bias is True, which",
    ),
    "another activation": (edit(CONFIG_FILE, lambda x: x.update(hidden_act="gelu")), "hidden_act is 'gelu'"),
    "another router": (edit(CONFIG_FILE, lambda x: x.update(topk_method="magic")), "topk_method is 'magic'"),
    "another rope": (
        edit(CONFIG_FILE, lambda x: (x.pop("rope_scaling"), x["rope_parameters"].update(rope_type="dynamic"))),
        "rope_type is 'dynamic', which is not supported; expected one of default, yarn, llama3",
    ),
    "ropes that disagree": (
        edit(CONFIG_FILE, lambda x: x["rope_scaling"].update(factor=9.0)),
        "rope_parameters and rope_scaling disagree about factor",
    ),
    "experts that groups do not divide": (edit(CONFIG_FILE, lambda x: x.update(n_group=3)), "expected a multiple of"),
    "another quantisation": (
        edit(CONFIG_FILE, lambda x: x.update(quantization_config={"quant_method": "awq"})),
        "quant_method is 'awq', which is not supported",
    ),
    "a tokenizer larger than the model": (
        edit("tokenizer.json", lambda x: x["model"]["vocab"].update({f"extra{n}": 300 + n for n in range(50)})),
        "expected at most vocab_size of config.json, which is 320",
    ),
    "a tokenizer that is none": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "is not a tokenizer",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_a_sentence_and_leaves_nothing(
    published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    damage, words = BAD[what]
    shutil.copytree(published, tmp_path / "bad")
    damage(tmp_path / "bad")
    assert cli.call(["convert", "import", str(tmp_path / "bad"), str(tmp_path / "in")]) == 2
    said = capfd.readouterr()
    assert words in said.err and "Traceback" not in said.err and "BOOM" not in said.err + said.out
    assert not (tmp_path / "in").exists() and not partial_directory(tmp_path / "in").exists()


def test_all_problems_are_told_at_once(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(published, tmp_path / "bad")
    edit(CONFIG_FILE, lambda x: x.update(hidden_act="gelu", n_routed_experts=None, rms_norm_eps="small"))(
        tmp_path / "bad"
    )
    assert cli.call(["convert", "import", str(tmp_path / "bad"), str(tmp_path / "in")]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("hidden_act", "n_routed_experts", "rms_norm_eps")) and said.count("\n") == 3


def test_code_that_a_config_names_is_not_run(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(published, tmp_path / "published")
    edit(CONFIG_FILE, lambda x: x.update(auto_map={"AutoModel": "evil.Model"}, index_topk=7))(tmp_path / "published")
    (tmp_path / "published" / "evil.py").write_text("raise SystemExit('BOOM')")
    assert cli.call(["convert", "import", str(tmp_path / "published"), str(tmp_path / "in")]) == 0
    said = capsys.readouterr().out
    assert "names code of its own (auto_map); it was not run" in said
    assert "says index_topk, which deepwright does not know and ignores" in said
    assert not (tmp_path / "in" / "evil.py").exists() and "evil" not in (tmp_path / "in" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "{nowhere}", "{out}"], "is no directory, no run id (32 hex digits) and no registered model"),
        (["export", "{empty}", "{out}"], "holds no model"),
        (["export", "{published}", "{out}"], "model_type is 'deepseek_v3'; expected 'deepwright'"),
        (["import", "{ours}", "{out}"], "model_type is 'deepwright'; expected one of"),
        (["import", "{nowhere}", "{out}"], "is not a directory"),
        (["export", "{ours}", "{published}"], "exists already and is not overwritten"),
        (["import", "{published}", "{out}", "--dtype", "fp8"], "fp8"),
        (["imprt", "{published}", "{out}"], "No such command"),
        (["import", "{published}"], "Missing argument"),
    ],
)
def test_wrong_requests(
    ours: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty", "out": tmp_path / "out"}
    places |= {"ours": ours, "published": published}
    assert cli.call(["convert", *(argument.format(**places) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


MEASURE = """
import sys
from pathlib import Path
from deepwright_core.huggingface import import_directory
from deepwright_core.plugins import installed
registry = installed().registry
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
import_directory(Path(sys.argv[1]), Path(sys.argv[3]), registry)  # a small one: everything is imported and warm
before = peak()
import_directory(Path(sys.argv[2]), Path(sys.argv[4]), registry)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_holds_about_a_file_and_not_the_model(published: Path, tmp_path: Path) -> None:
    """A model of 420 MB in files of 40 MB: the peak stays near one file."""
    changes = {"vocab_size": 20000, "hidden_size": 512, "layers": 9, "mtp": {"depth": 0}, "init_std": 0.02}
    ffn = CONFIG["ffn"] | {"intermediate_size": 768, "experts": 8}
    config = parse(ModelConfig, {**CONFIG, **changes, "ffn": ffn}, "model", installed().registry)
    save_model(build_model(installed().registry, config, seed=0), tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert cli.call(["convert", "export", str(tmp_path / "large"), str(tmp_path / "files"), "--shard-gb", "0.04"]) == 0
    shutil.rmtree(tmp_path / "large")
    arguments = [str(published), str(tmp_path / "files"), str(tmp_path / "small-in"), str(tmp_path / "large-in")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    peak = int(done.stdout)
    print(f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB")
    assert size > 400e6 and 1e6 < peak < size / 4, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
