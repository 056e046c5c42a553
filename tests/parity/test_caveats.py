"""What an export says about its readers: it must be so, and nothing is said where nothing is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast

from deepwright_core.huggingface import export_directory
from deepwright_core.huggingface.llama import QWEN2_CUT
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import parse
from deepwright_core.tokenizer import Tokenizer, bpe

from .published_models import registry, transformers

TEXT = "They'll say it's 123,  don't\n\n  they? I'VE Ma\u0308use."
GROUPED = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8}
LATENT = {
    "name": "mla",
    "heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
MIXTURE = {"name": "moe", "experts": 4, "top_k": 2, "intermediate_size": 8, "router": {"name": "noaux_tc"}}


def write_model(directory: Path, **values: Any) -> Tokenizer:
    tokenizer = bpe.train(bpe.BpeConfig(vocab_size=400), [TEXT] * 3)
    config = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "layers": 2, "intermediate_size": 16, **values}
    save_model(build_model(registry(), parse(ModelConfig, config, "model", registry()), seed=0), directory)
    tokenizer.save(directory)
    return tokenizer


def test_a_tokenizer_beside_a_qwen2_model_is_read_as_qwen2s(tmp_path: Path) -> None:
    tokenizer = write_model(tmp_path / "ours", attention={**GROUPED, "qkv_bias": True}, ffn={"name": "dense"})
    converted = export_directory(tmp_path / "ours", tmp_path / "theirs", registry())
    assert converted.format == "qwen2"
    assert len(converted.notes) == 1 and "PreTrainedTokenizerFast.from_pretrained" in converted.notes[0]
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "theirs")(TEXT)["input_ids"] == ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")(TEXT)["input_ids"] != ids


def test_qwen2s_own_tokenizer_is_read_as_it_is(tmp_path: Path) -> None:
    write_model(tmp_path / "ours", attention={**GROUPED, "qkv_bias": True}, ffn={"name": "dense"})
    path = tmp_path / "ours" / "tokenizer.json"
    cut = Fast.from_str(path.read_text())
    cut.normalizer = normalizers.NFC()
    cut.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    cut.save(str(path))
    converted = export_directory(tmp_path / "ours", tmp_path / "theirs", registry())
    assert converted.notes == ()
    tokenizer = Tokenizer.load(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs(TEXT)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert len(theirs) == tokenizer.vocab_size  # nothing was added that the model has no row for


@pytest.mark.parametrize("shared", [0, 1])
def test_a_mixture_without_shared_experts(tmp_path: Path, shared: int) -> None:
    write_model(tmp_path / "ours", attention=LATENT, ffn={**MIXTURE, "shared_experts": shared})
    notes = export_directory(tmp_path / "ours", tmp_path / "theirs", registry()).notes
    assert [note.split(":")[0] for note in notes] == ["model.ffn.shared_experts is 0"] * (not shared)


def test_a_dense_model_without_a_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path / "ours", attention={**GROUPED, "qkv_bias": True}, ffn={"name": "dense"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "ours" / name).unlink()
    notes = export_directory(tmp_path / "ours", tmp_path / "theirs", registry()).notes
    assert [note.split(":")[0] for note in notes] == ["There is no tokenizer.json"]
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "qwen2"
