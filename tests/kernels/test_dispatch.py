"""Which backend runs: by device, by choice, and what is said when the choice cannot be honoured."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from deepwright_kernels import (
    BackendWarning,
    add_backend,
    backend_for,
    choices,
    configure,
    dispatch,
    grouped_linear,
    operators,
    rms_norm,
    rotary,
)
from deepwright_kernels.constant_result import constant_result

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "_warned", set())


def test_every_operator_has_a_reference() -> None:
    assert sorted(operators()) == [
        "add_rms_norm",
        "context_attention",
        "dequantise_fp8_blocks",
        "draw_tokens",
        "expert_order",
        "fp8_grouped_matmul",
        "fp8_grouped_outer",
        "fp8_matmul",
        "grouped_linear",
        "grouped_swiglu",
        "latent_cache_write",
        "linear_cross_entropy",
        "mla_paged_decode",
        "newton_schulz",
        "packed_attention",
        "permute",
        "quantise_fp8_blocks",
        "quantise_fp8_columns",
        "quantise_fp8_rows",
        "quantise_fp8_rows_and_columns",
        "rms_norm",
        "rotary",
        "rotary_tail",
        "route",
        "swiglu_backward_quantise_fp8",
        "swiglu_quantise_fp8",
        "unpermute",
        "weighted_linear_cross_entropy",
    ]
    for name, backends in operators().items():
        assert "reference" in backends
        assert callable(dispatch.load(name, "reference"))
        assert backend_for(name, CPU) in {"reference", "torch"}


def test_a_choice_holds_inside_its_block_or_from_then_on() -> None:
    with configure({"rms_norm": "reference"}):
        assert backend_for("rms_norm", CPU) == "reference"
        with configure({"rms_norm": "torch"}):
            assert backend_for("rms_norm", CPU) == "torch"
        assert backend_for("rms_norm", CPU) == "reference"
    assert choices()["rms_norm"] == "auto"
    with configure({}):
        configure({"rms_norm": "reference"})
        assert choices()["rms_norm"] == "reference"
    assert choices()["rms_norm"] == "auto"


def test_a_star_stands_for_every_operator_that_has_the_backend() -> None:
    with configure({"*": "reference", "rms_norm": "torch"}):
        chosen = choices()
    assert chosen.pop("rms_norm") == "torch"
    assert set(chosen.values()) == {"reference"}


def test_a_backend_that_cannot_run_is_replaced_and_that_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    with configure({"*": "triton"}):
        assert [backend_for("rotary", CPU) for _ in range(3)] == ["torch"] * 3
    said = [str(warning.message) for warning in recwarn if warning.category is BackendWarning]
    assert len(said) == 1
    assert said[0].startswith("rotary: the backend 'triton' cannot run because")


def test_auto_says_so_when_a_gpu_has_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda module: False)

    class OnGpu:
        device = torch.device("cuda")
        dtype = torch.float32

    with pytest.warns(BackendWarning, match="triton is not installed"):
        assert backend_for("rms_norm", OnGpu()) == "reference"  # type: ignore[arg-type]


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"There is no operator 'rms_nrm'\. Did you mean rms_norm\?"):
        configure({"rms_nrm": "triton"})
    with pytest.raises(
        ValueError, match="rms_norm has no backend 'cudnn'; expected one of auto, reference, torch, triton"
    ):
        configure({"rms_norm": "cudnn"})
    with pytest.raises(ValueError, match="Backend 'cudnn' for every operator"):
        configure({"*": "cudnn"})


def test_an_added_backend_runs_only_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = dispatch._operators["rms_norm"]
    monkeypatch.setattr(declared, "backends", dict(declared.backends))
    monkeypatch.setattr(declared, "available", {})
    add_backend("rms_norm", "vendor", lambda x, weight, eps: x + 1)
    assert backend_for("rms_norm", CPU) != "vendor"
    with configure({"rms_norm": "vendor"}):
        assert torch.equal(rms_norm(torch.zeros(2, 3), torch.ones(3)), torch.ones(2, 3))
    with pytest.raises(ValueError, match="already has a backend called 'vendor'"):
        add_backend("rms_norm", "vendor", lambda *_: None)

    add_backend("rms_norm", "elsewhere", lambda *_: None, available=lambda tensor: "it needs another machine")
    with configure({"rms_norm": "elsewhere"}), pytest.raises(ValueError, match="because it needs another machine"):
        backend_for("rms_norm", CPU)


def test_a_backend_that_was_chosen_by_name_runs_or_is_refused() -> None:
    with (
        configure({"rotary": "triton"}),
        pytest.raises(
            ValueError,
            match=r"rotary: the backend 'triton' was chosen and cannot run because the tensor is on cpu.*'auto'",
        ),
    ):
        rotary(torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2))


@pytest.fixture
def sized() -> Iterator[str]:
    """An operator whose backends depend on its arguments."""
    dispatch.operator(
        "sized",
        {"reference": "math:sqrt", "torch": "math:exp", "vendor": "math:sin"},
        elsewhere=lambda tensor, rows: ("torch", "reference") if rows > 10 else ("reference", "torch"),
        needs={"torch": lambda tensor, rows: "rows is odd" if rows % 2 else None},
    )
    yield "sized"
    del dispatch._operators["sized"]


def test_the_order_may_depend_on_the_arguments_and_a_backend_may_need_something_of_them(sized: str) -> None:
    assert backend_for(sized, CPU, 2) == "reference"
    assert backend_for(sized, CPU, 12) == "torch"
    with pytest.warns(BackendWarning, match="sized: the backend 'torch' cannot run because rows is odd"):
        assert backend_for(sized, CPU, 13) == "reference"
    with configure({sized: "torch"}), pytest.raises(ValueError, match="because rows is odd"):
        backend_for(sized, CPU, 1)


@pytest.mark.costly
def test_torch_compile_sees_through_the_dispatch() -> None:
    x, weight, angle = torch.randn(4, 8, requires_grad=True), torch.randn(8), torch.randn(4, 4)
    # In bfloat16: torch cannot yet trace its grouped product in float32.
    experts, ends = torch.randn(2, 8, 8).bfloat16(), torch.tensor([1, 4], dtype=torch.int32)

    def model(x: torch.Tensor) -> torch.Tensor:
        return (
            grouped_linear(rotary(rms_norm(x, weight), angle.cos(), angle.sin()).bfloat16(), experts, ends)
            .square()
            .sum()
        )

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(model(x), x))


def test_constant_results_bear_the_mark_that_torch_sets() -> None:
    def ours() -> int:
        return 1

    def torchs() -> int:
        return 1

    assert constant_result(ours)() == 1
    assert vars(ours) == vars(torch.compiler.assume_constant_result(torchs))


def test_importing_and_using_the_package_on_a_cpu_leaves_triton_and_the_tracer_alone() -> None:
    program = """
import sys, torch, deepwright_kernels as k
k.rms_norm(torch.ones(2, 4), torch.ones(4))
k.rotary(torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2))
loaded = [name for name in sys.modules if name == "deepwright_kernels" or name.startswith("deepwright_kernels.")]
assert not [name for name in loaded if name.endswith(".triton")], loaded
assert "torch._dynamo" not in sys.modules, "torch's tracer takes a second to import"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
