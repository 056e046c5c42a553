"""The layout of DeepSeek-V3 as it is published: 671 billion parameters in FP8, without a byte of data.

Names and shapes come from transformers' own class (the main model) and from the published names of the module of
multi-token prediction. The files have real headers and holes for content, so the whole import can be rehearsed.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from flows import cli

transformers = pytest.importorskip("transformers")

# config.json of DeepSeek-V3.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
FILES = 163
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """On-disk names and shapes: experts lie apart, and layer 61 is the module of multi-token prediction."""
    config = transformers.DeepseekV3Config(
        **{k: v for k, v in PUBLISHED.items() if k not in ("auto_map", "model_type")}
    )
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            experts, both, hidden = tensor.shape
            for expert in range(experts):
                for part in ("gate_proj", "up_proj"):
                    shapes[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = (both // 2, hidden)
        elif name.endswith("mlp.experts.down_proj"):
            for expert in range(tensor.shape[0]):
                shapes[name.replace("down_proj", f"{expert}.down_proj.weight")] = tuple(tensor.shape[1:])
        else:
            shapes[name] = tuple(tensor.shape)
    hidden, vocabulary = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    last = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.60.")}
    shapes |= {name.replace("layers.60.", "layers.61."): shape for name, shape in last.items()}
    shapes |= {f"model.layers.61.{norm}.weight": hidden for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"model.layers.61.{table}.weight": vocabulary for table in ("embed_tokens", "shared_head.head")}
    shapes["model.layers.61.eh_proj.weight"] = (config.hidden_size, 2 * config.hidden_size)
    return shapes


def stored_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes in the files: matrices of attention and feed-forwards in FP8, with their scales."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in published_shapes().items():
        if len(shape) == 2 and ("_proj" in name or "_proj_with_mqa" in name) and "eh_proj" not in name:
            stored[name] = ("F8_E4M3", shape)
            stored[f"{name}_scale_inv"] = ("F32", tuple(math.ceil(size / 128) for size in shape))
        else:
            stored[name] = ("F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
    return stored


def write_headers(directory: Path, stored: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Files with true headers and nothing behind them; weight and scale may lie in different ones."""
    placed: dict[str, str] = {}
    names = sorted(stored)
    each = math.ceil(len(names) / FILES)
    for number in range(FILES):
        file = f"model-{number + 1:05}-of-{FILES:06}.safetensors"
        header, begin = {}, 0
        for name in names[number * each : (number + 1) * each]:
            dtype, shape = stored[name]
            end = begin + math.prod(shape) * SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
            placed[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + begin)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (directory / "config.json").write_text(json.dumps(PUBLISHED))
    return placed


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layout")
    write_headers(directory, stored_tensors())
    return directory


def test_every_tensor_of_the_published_671b_model_has_its_place(
    layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.call(["convert", "import", str(layout), str(tmp_path / "in"), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    shapes = published_shapes()
    numbers = {name: math.prod(shape) for name, shape in shapes.items()}
    main = sum(count for name, count in numbers.items() if not name.startswith("model.layers.61."))
    assert round(main / 1e9, 3) == 671.026 and round(sum(numbers.values()) / 1e9, 2) == 684.49
    # One tensor of ours for each name in a block, embedding, norm and head; experts stacked; copies not twice.
    copies = sum(numbers[f"model.layers.61.{name}.weight"] for name in ("embed_tokens", "shared_head.head"))
    biases = 59 * 256
    assert report["dtypes"]["F32"] == 59
    assert report["bytes"] == 2 * (sum(numbers.values()) - copies - biases) + 4 * biases
    assert not (tmp_path / "in").exists()


def test_one_tensor_too_few_among_92_thousand_is_named(
    layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = stored_tensors()
    lost = "model.layers.37.mlp.experts.131.up_proj.weight"
    del stored[lost], stored[f"{lost}_scale_inv"]
    dtype, (rows, columns) = stored["model.layers.5.self_attn.kv_a_proj_with_mqa.weight"]
    assert (dtype, rows) == ("F8_E4M3", 576)
    stored["model.layers.5.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] = ("F32", (4, columns // 128))
    write_headers(tmp_path, stored)
    assert cli.call(["convert", "import", str(tmp_path), str(tmp_path / "in")]) == 2
    said = capsys.readouterr().err
    assert "scale of shape [4, 56]; expected [5, 56]" in said  # the partial block counts
    stored["model.layers.5.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] = ("F32", (5, columns // 128))
    write_headers(tmp_path, stored)
    assert cli.call(["convert", "import", str(tmp_path), str(tmp_path / "in")]) == 2
    assert f"'{lost}' is missing" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "in").exists()


def test_the_rehearsal_stops_where_the_disk_would_be_full(
    layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.disk_usage(tmp_path).free > 1.4e12:
        pytest.skip("this disk has room for the whole model")
    assert cli.call(["convert", "import", str(layout), str(tmp_path / "in")]) == 2
    assert "GiB free; the result takes" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
