"""What a model is, as data: sizes, and the names of the components that fill its places.

`ModelConfig` checks what concerns the whole; each component checks its own part through the registry, so that a model
with a stranger's attention is validated as strictly as a built-in one.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..registry import ComponentOf


class YarnConfig(BaseModel):
    """YaRN context extension (Peng et al. 2023) with the DeepSeek defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(40.0, ge=1.0)
    original_positions: int = Field(4096, ge=1)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class Llama3RopeConfig(BaseModel):
    """Llama 3.1's context extension with its published defaults: slow pairs are slowed further by `factor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(8.0, ge=1.0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_positions: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Llama3RopeConfig:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor:g}; "
                f"expected more than low_freq_factor, which is {self.low_freq_factor:g}"
            )
        return self


class RopeConfig(BaseModel):
    """Rotary position embedding: base frequency and at most one extension of the context."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    theta: float = Field(10000.0, gt=1.0)
    yarn: YarnConfig | None = None
    llama3: Llama3RopeConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        if self.yarn is not None and self.llama3 is not None:
            raise ValueError("yarn and llama3 are both given; expected at most one of them")
        return self


class MtpConfig(BaseModel):
    """Multi-token prediction (DeepSeek-V3 report, section 2.2): extra modules and the weight λ of their loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(0, ge=0, le=4)
    loss_weight: float = Field(0.3, ge=0.0)


class ModelConfig(BaseModel):
    """A whole model.

    hidden_size: width D of the residual stream. layers: number of blocks.
    intermediate_size: width of the dense SwiGLU feed-forward of the first `first_dense_layers` blocks (and of every
    block with `ffn.name: dense`, unless that component says otherwise).
    vocab_size: 0 means "as many as the tokenizer has"; it is filled in when the model is built.
    init_std: standard deviation of every weight at the start (V3: 0.006).
    init: a model directory whose weights are the start, in place of random ones; all other keys then say what its
    config.json says. It belongs to a run and is no part of a model: no config.json holds it, and no identity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    init: str = Field("", exclude=True)
    vocab_size: int = Field(0, ge=0)
    hidden_size: int = Field(ge=1)
    layers: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    first_dense_layers: int = Field(0, ge=0)
    max_positions: int = Field(4096, ge=2)
    norm_eps: float = Field(1e-6, gt=0)
    tied_head: bool = False
    init_std: float = Field(0.006, gt=0)
    rope: RopeConfig = RopeConfig()
    mtp: MtpConfig = MtpConfig()
    attention: Annotated[dict[str, Any], ComponentOf("attention")]
    ffn: Annotated[dict[str, Any], ComponentOf("ffn")]

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.first_dense_layers > self.layers:
            raise ValueError(
                f"first_dense_layers is {self.first_dense_layers} but the model has {self.layers} layers; "
                "expected at most that many"
            )
        return self

    def too_long(self, length: int, where: str, model: str = "model") -> list[str]:
        """A sentence when rows of `length` tokens, set at `where`, are longer than the model has positions for."""
        if length <= self.max_positions:
            return []
        return [f"{where} is {length}; expected at most {model}.max_positions, which is {self.max_positions}."]
