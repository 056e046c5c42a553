"""What the routes work with: the engine in its thread, the tokenizer, the limits, and proof that it all still works."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepwright_core.engine import SamplingParams
from deepwright_core.tokenizer import Tokenizer

from .edge import Door
from .keys import Keys
from .limits import Limits
from .protocol import GenerationRequest
from .refusal import Refusal
from .scheduling import EngineLike, EngineThread, Ticket

# A token for somebody this recently proves as much as a probe would.
FRESH_SECONDS = 1.0


@dataclass
class Service:
    """What the routes work with. `context` is the most tokens that prompt and answer may have together."""

    engine: EngineLike
    tokenizer: Tokenizer
    name: str
    context: int
    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    local: bool = True

    def __post_init__(self) -> None:
        self.thread = EngineThread(self.engine, self.limits.running + self.limits.waiting)
        self.door = Door(self.keys, self.local)
        self.created = int(time.time())
        self._probe: asyncio.Task[None] | None = None

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt: one must be left for the answer."""
        return min(self.limits.prompt_tokens or self.context, self.context - 1)

    def require_model(self, name: str) -> None:
        """Refuse a model that is not served."""
        if name != self.name:
            raise Refusal(
                404, f"There is no model '{name}' here; this server has '{self.name}'.",
                param="model", code="model_not_found",
            )  # fmt: skip

    def params(self, request: GenerationRequest, prompt: Sequence[int], wanted: int | None) -> list[SamplingParams]:
        """Sampling of each of a prompt's answers; refuses what does not fit."""
        if len(prompt) > self.longest_prompt:
            raise Refusal(
                400, f"The prompt has {len(prompt)} tokens; at most {self.longest_prompt} are possible. Shorten it.",
                param="messages" if hasattr(request, "messages") else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        left = self.context - len(prompt)
        most = min(self.limits.output_tokens or left, left)
        if wanted is not None and wanted > most:
            raise Refusal(
                400,
                f"max_tokens is {wanted}; beside a prompt of {len(prompt)} tokens, at most {most} are possible "
                f"(context {self.context}).",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        length = min(self.limits.default_output_tokens, most) if wanted is None else wanted
        seed = secrets.randbits(62) if request.seed is None else request.seed
        one = 1.0
        return [
            SamplingParams(
                max_tokens=length,
                temperature=one if request.temperature is None else request.temperature,
                top_p=one if request.top_p is None else request.top_p,
                top_k=max(request.top_k or 0, 0),
                min_p=request.min_p or 0.0,
                seed=(seed + choice) % (1 << 63),
                # The next turn is the user's to write.
                stop_ids=() if self.tokenizer.user_id is None else (self.tokenizer.user_id,),
            )
            for choice in range(request.choices)
        ]

    def require_room_at_all(self, answers: int) -> None:
        """Refuse a request that could not even run alone."""
        if answers > self.thread.capacity:
            raise Refusal(400, f"The request asks for {answers} answers; at most {self.thread.capacity} are possible.")

    async def prove_alive(self) -> None:
        """Return once a token was generated just now, for a probe or for anybody; `Refusal` after the deadline."""
        if self.thread.broken is not None:
            raise Refusal(503, f"The engine has stopped: {self.thread.broken}.", code="engine_failed")
        if time.monotonic() - self.thread.last_token_at < FRESH_SECONDS:
            return
        # Callers at the same time share one probe.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._generate_one())
        await asyncio.shield(self._probe)

    async def _generate_one(self) -> None:
        limit = self.limits.health_seconds
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        ticket = Ticket([*self.tokenizer.begin_ids] or [0], params, sink=lambda item: None)
        seen = asyncio.ensure_future(self.thread.wait_for_token())
        try:
            # When every place is taken, the running requests are the probe.
            if self.thread.open < self.thread.capacity:
                self.thread.submit([ticket])
            async with asyncio.timeout(limit):
                await seen
        except TimeoutError:
            raise Refusal(503, f"No token was generated within {limit:g} s.", code="engine_stuck") from None
        finally:
            seen.cancel()
            self.thread.cancel(ticket)
