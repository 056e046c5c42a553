"""Published checkpoints: what is written is read back bit for bit, streams, resumes, and never half exists."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepwright_core.errors import RequestError, WorkError
from deepwright_core.huggingface import conversion, export_directory, from_published, import_directory, to_published
from deepwright_core.huggingface.conversion import Plan, Step, partial_directory
from deepwright_core.huggingface.piece import HalvesToPairs
from deepwright_core.huggingface.streaming_files import Planned, StreamingFiles
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry, parse
from deepwright_core.tracking import SilentProgress


def build(registry: Registry, **changes: Any) -> Transformer:
    values = {
        "vocab_size": 48,
        "hidden_size": 16,
        "layers": 2,
        "intermediate_size": 24,
        "init_std": 0.4,
        "attention": {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
        "ffn": {"name": "dense"},
        **changes,
    }
    return build_model(registry, parse(ModelConfig, values, "model", registry), seed=0)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def test_rotary_rows_change_places_and_come_back() -> None:
    theirs = torch.arange(2 * 6.0)[:, None]  # two heads of width 6: halves 0 1 2 | 3 4 5
    ours = HalvesToPairs(6).to_ours(theirs)
    assert ours[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(HalvesToPairs(6).to_theirs(ours), theirs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_and_imported_again_every_bit_is_the_same(
    registry: Registry, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    model = build(registry, tied_head=tied, rope={"theta": 5000.0}, norm_eps=1e-5, max_positions=77)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    save_model(model, tmp_path / "ours")
    exported = export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    imported = import_directory(tmp_path / "theirs", tmp_path / "again", registry)
    assert (exported.format, imported.format) == ("llama", "llama")
    assert same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "again"))
    assert load_model(tmp_path / "again", registry).config == model.config.model_copy(
        update={"rope": model.config.rope}
    )
    assert ("lm_head.weight" in tensors_of(tmp_path / "theirs")) != tied
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_in_memory_and_on_the_disk_are_the_same(registry: Registry, tmp_path: Path) -> None:
    model = build(registry)
    save_model(model, tmp_path / "ours")
    export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    config, tensors = to_published(registry, model)
    assert same(tensors, tensors_of(tmp_path / "theirs"))
    back = from_published(registry, config, tensors)
    assert same(dict(back.state_dict()), dict(model.state_dict()))
    del tensors["model.norm.weight"]
    tensors["stranger"] = torch.zeros(1)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(RequestError) as caught:
        from_published(registry, config, tensors)
    assert [problem.split("'")[1] for problem in caught.value.problems] == [
        "model.norm.weight",
        "stranger",
        "model.layers.1.mlp.up_proj.weight",
    ]


def test_small_files_of_weights_get_an_index(registry: Registry, tmp_path: Path) -> None:
    model = build(registry)
    save_model(model, tmp_path / "ours")
    export_directory(tmp_path / "ours", tmp_path / "theirs", registry, most_bytes=4000)
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)
    tensors = tensors_of(tmp_path / "theirs")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for file in files:  # each within the limit, unless one tensor alone is larger
        content = load_file(tmp_path / "theirs" / file)
        assert len(content) == 1 or sum(t.numel() * 4 for t in content.values()) <= 4000
    imported = import_directory(tmp_path / "theirs", tmp_path / "again", registry, most_bytes=4000)
    assert imported.tensors_read == len(tensors)
    assert same(dict(load_model(tmp_path / "again", registry).state_dict()), dict(model.state_dict()))


def test_every_reader_of_the_format_reads_files_written_in_any_order(tmp_path: Path) -> None:
    planned = [
        Planned("bytes", torch.float8_e4m3fn, (3, 5)),
        Planned("wide", torch.float32, (7,)),
        Planned("none", torch.float32, (0, 4)),
        Planned("half", torch.bfloat16, (3, 3)),
    ]
    values = {
        "bytes": torch.arange(15.0).view(3, 5).to(torch.float8_e4m3fn),
        "wide": torch.randn(7),
        "none": torch.zeros(0, 4),
        "half": torch.randn(3, 3).bfloat16(),
    }
    files = StreamingFiles(tmp_path, planned, 10**9)
    for row in (2, 0, 1):
        files.write("half", row * 3, values["half"][row])
        files.write("bytes", row * 5, values["bytes"][row])
    files.write("wide", 4, values["wide"][4:])
    files.write("wide", 0, values["wide"][:4])
    files.finish()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in values.items():
            read = file.get_tensor(name)
            assert read.dtype == value.dtype and torch.equal(read.float(), value.float())


def test_dtypes_can_be_chosen_and_overflow_is_refused(registry: Registry, tmp_path: Path) -> None:
    model = build(registry)
    save_model(model, tmp_path / "ours")
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        export_directory(tmp_path / "ours", tmp_path / dtype, registry, dtype=dtype)
        assert {tensor.dtype for tensor in tensors_of(tmp_path / dtype).values()} == {kind}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == str(kind)[6:]
    model.norm.weight.data[0] = 1e6
    save_model(model, tmp_path / "large")
    with pytest.raises(RequestError, match=r"'norm\.weight' has values that F16 cannot hold"):
        export_directory(tmp_path / "large", tmp_path / "lost", registry, dtype="fp16")
    with pytest.raises(RequestError, match="dtype is 'int4'; expected one of keep"):
        export_directory(tmp_path / "ours", tmp_path / "lost", registry, dtype="int4")
    export_directory(tmp_path / "large", tmp_path / "kept", registry)
    with pytest.raises(RequestError, match=r"'model\.norm\.weight' has values that F16 cannot hold"):
        import_directory(tmp_path / "kept", tmp_path / "lost", registry, dtype="fp16")
    assert not (tmp_path / "lost").exists() and not partial_directory(tmp_path / "lost").exists()


def test_nothing_is_overwritten(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious.txt").write_text("mine")
    with pytest.raises(RequestError, match="exists already and is not overwritten"):
        export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    export_directory(tmp_path / "ours", tmp_path / "empty", registry)
    assert (tmp_path / "empty" / "config.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        export_directory(tmp_path / "ours", tmp_path / "file" / "below", registry)


def test_a_dry_run_writes_nothing(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path / "ours")
    would = export_directory(tmp_path / "ours", tmp_path / "theirs", registry, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    did = export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    assert would == did


class Interrupted(SilentProgress):
    """Stops the work as Ctrl-C would, after some progress."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error, self.began = after, error, 0

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self.began = completed

    def advance(self, completed: int, note: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise self.error


def test_a_conversion_goes_on_where_it_was_cut_off(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(build(registry), tmp_path / "ours")
    export_directory(tmp_path / "ours", tmp_path / "whole", registry)
    with pytest.raises(KeyboardInterrupt):
        export_directory(tmp_path / "ours", tmp_path / "cut", registry, progress=Interrupted(7, KeyboardInterrupt))
    assert not (tmp_path / "cut").exists()
    done = json.loads((partial_directory(tmp_path / "cut") / "done.json").read_text())["steps"]
    assert done == 7
    steps: list[str] = []
    write = StreamingFiles.write
    monkeypatch.setattr(
        StreamingFiles, "write", lambda self, name, *rest: (steps.append(name), write(self, name, *rest))
    )
    export_directory(tmp_path / "ours", tmp_path / "cut", registry)
    assert len(steps) == len(tensors_of(tmp_path / "whole")) - done
    assert same(tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "whole"))
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["config.json", "model.safetensors"]
    assert not partial_directory(tmp_path / "cut").exists()


def test_what_was_cut_off_is_not_mixed_with_another_source(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path / "ours")
    with pytest.raises(KeyboardInterrupt):
        export_directory(tmp_path / "ours", tmp_path / "cut", registry, progress=Interrupted(3, KeyboardInterrupt))
    with pytest.raises(RequestError, match="left from another conversion"):
        export_directory(tmp_path / "ours", tmp_path / "cut", registry, dtype="bf16")
    os.utime(tmp_path / "ours" / "model.safetensors", ns=(1, 1))
    with pytest.raises(RequestError, match="left from another conversion"):
        export_directory(tmp_path / "ours", tmp_path / "cut", registry)
    shutil.rmtree(partial_directory(tmp_path / "cut"))
    export_directory(tmp_path / "ours", tmp_path / "cut", registry)


def test_a_disk_without_room_is_noticed_before_and_while_writing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(build(registry), tmp_path / "ours")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(conversion.shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(RequestError, match="GiB free; the result takes"):
            export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(WorkError, match=r"No space left on device.*goes on where it stopped"):
            export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    assert not (tmp_path / "theirs").exists()
    export_directory(tmp_path / "ours", tmp_path / "theirs", registry)


def test_bad_input_found_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def bad(files: StreamingFiles) -> None:
        raise RequestError("the source is bad")

    planned = [Planned("a", torch.float32, (4,))]
    steps = [Step(16, lambda files: files.write("a", 0, torch.zeros(4))), Step(0, bad)]
    with pytest.raises(RequestError, match="the source is bad"):
        conversion.run(Plan(planned, steps, {}, {}), tmp_path / "out", SilentProgress(), 10**9)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_format_says_why(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry, mtp={"depth": 1}), tmp_path / "ours")
    with pytest.raises(RequestError) as caught:
        export_directory(tmp_path / "ours", tmp_path / "theirs", registry)
    assert caught.value.problems[0] == "No published format can hold this model."
    assert any("llama: model.mtp.depth is 1, expected 0" in problem for problem in caught.value.problems)
    exported = export_directory(tmp_path / "ours", tmp_path / "theirs", registry, without_mtp=True)
    assert exported.notes[0] == "Left out 1 module(s) of multi-token prediction."


def test_fp8_blocks_are_multiplied_out_exactly(registry: Registry, tmp_path: Path) -> None:
    """Widths of 160 make partial blocks; what FP8 can hold comes back as it was."""
    model = build(registry, hidden_size=160, intermediate_size=288)
    save_model(model, tmp_path / "ours")
    export_directory(tmp_path / "ours", tmp_path / "fp8", registry, dtype="fp8")
    stored = tensors_of(tmp_path / "fp8")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn and stored[f"{name}_scale_inv"].shape == (2, 3)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128] and config["dtype"] == "bfloat16"
    import_directory(tmp_path / "fp8", tmp_path / "again", registry, dtype="fp32")
    ours = tensors_of(tmp_path / "again")["layers.0.ffn.down.weight"]
    values, scales = stored[name].float(), stored[f"{name}_scale_inv"]
    for row in range(160):  # by hand, element by element of some columns
        for column in (0, 127, 128, 287):
            assert ours[row, column] == values[row, column] * scales[row // 128, column // 128]
    export_directory(tmp_path / "again", tmp_path / "fp8-again", registry, dtype="fp8")
    assert torch.equal(tensors_of(tmp_path / "fp8-again")[name].float(), values)
    export_directory(tmp_path / "ours", tmp_path / "powers", registry, dtype="fp8", scale_format="ue8m0")
    powers = tensors_of(tmp_path / "powers")
    assert torch.equal(powers[f"{name}_scale_inv"].log2() % 1, torch.zeros(2, 3))
    assert json.loads((tmp_path / "powers" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    # Scales may also be stored in a byte each.
    small = {n: t.to(torch.float8_e8m0fnu) if n.endswith("_scale_inv") else t for n, t in powers.items()}
    save_file(small, tmp_path / "powers" / "model.safetensors")
    import_directory(tmp_path / "powers", tmp_path / "from-bytes", registry, dtype="fp32")
    read = tensors_of(tmp_path / "from-bytes")["layers.0.ffn.down.weight"]
    blocks = powers[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:160, :288]
    assert torch.equal(read, powers[name].float() * blocks)
