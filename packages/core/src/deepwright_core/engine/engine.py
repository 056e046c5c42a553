"""The engine: requests in, tokens out.

    engine = Engine(model, eos_id=1)
    completions = engine.generate(prompts, SamplingParams(max_tokens=64))

or, a token at a time, `add`, then `step` while `has_work`. One thread drives it; nothing here waits or locks.
Left out: text (see the tokenizer), transport (see the server).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Ordered
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from deepwright_kernels.row_by_row import row_by_row

from ..errors import RequestError, WorkError
from ..model.directory import replace_weights
from .adapters import Adapters
from .block_manager import BlockManager
from .runner import CacheDtype, GenerationModel, GraphsOption, ModelRunner, RunningStep
from .scheduler import Scheduler
from .sequence import Completion, SamplingParams, Sequence, TokenEvent
from .speculation import modules_used


@dataclass(frozen=True)
class EngineStats:
    """Where the engine stands, and what it has done since it was made.

    prompt_tokens counts each request once, at its first admission; cached_prompt_tokens are those of them that were
    found in the prefix cache. Speculation: draft_steps counts verifications of one request's drafts, draft_tokens what
    was drafted in them, accepted_at how often the first draft was accepted, the second, and so on.
    """

    running: int
    waiting: int
    cache_blocks_used: int
    cache_blocks_total: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    cached_prompt_tokens: int
    draft_steps: int
    draft_tokens: int
    accepted_at: tuple[int, ...]

    @property
    def accepted_tokens(self) -> int:
        """Drafted tokens that were accepted."""
        return sum(self.accepted_at)


# What the decode kernels for GPUs read at a time; on a CPU, shorter blocks share more of what prompts have in common.
GPU_BLOCK_SIZE, CPU_BLOCK_SIZE = 64, 16


class Engine:
    """Continuous batching over a paged cache.

    eos_id: the id (or ids) that end a completion. cache_tokens: tokens that the cache holds, in blocks of block_size
    (None: 64 on a GPU, 16 elsewhere). max_batch: sequences that run at once. max_prefill_tokens: prompt tokens of one
    step. cache_dtype: "auto" caches in the weights' dtype, "fp8" in the attention's FP8 form (latent attention: 57 % of
    bf16's bytes, near its answers). graphs: "auto" decodes through CUDA graphs on a GPU; "off" starts every kernel by
    itself, for models that cannot be captured or whose steps are to be looked at. speculate: how many tokens the
    model's MTP modules draft for each request and step (0: none; see `speculation`). It changes no token, only how many
    come in a step. batch_invariant: a request's tokens and log-probabilities are the same to the last bit whatever runs
    beside it, in chunks or not, from the prefix cache or not (see `deepwright_kernels.row_by_row`); this costs speed.
    """

    def __init__(
        self,
        model: GenerationModel,
        eos_id: int | Iterable[int],
        *,
        cache_tokens: int = 65536,
        block_size: int | None = None,
        max_batch: int = 256,
        max_prefill_tokens: int = 8192,
        cache_dtype: CacheDtype = "auto",
        graphs: GraphsOption = "auto",
        speculate: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        if block_size is None:
            on_gpu = next(iter(model.parameters())).device.type == "cuda"
            block_size = GPU_BLOCK_SIZE if on_gpu else CPU_BLOCK_SIZE
        sizes = {
            "cache_tokens": cache_tokens,
            "block_size": block_size,
            "max_batch": max_batch,
            "max_prefill_tokens": max_prefill_tokens,
        }
        problems = [f"{name} is {value}; expected at least 1." for name, value in sizes.items() if value < 1]
        if not problems and cache_tokens < block_size:
            problems.append(f"cache_tokens is {cache_tokens}; expected at least one block (block_size {block_size}).")
        if cache_dtype not in get_args(CacheDtype):
            problems.append(f"cache_dtype is '{cache_dtype}'; expected auto or fp8.")
        if graphs not in get_args(GraphsOption):
            problems.append(f"graphs is '{graphs}'; expected auto or off.")
        if batch_invariant and cache_dtype == "fp8":
            problems.append("batch_invariant is on and cache_dtype is 'fp8', which has no such form; expected auto.")
        if problems:
            raise RequestError(problems)
        modules = modules_used(model, speculate)
        blocks = cache_tokens // block_size
        self.model = model
        self._batch_invariant = batch_invariant
        self.eos_ids = frozenset((eos_id,) if isinstance(eos_id, int) else eos_id)
        self.cache_capacity = blocks * block_size
        self._scheduler = Scheduler(
            BlockManager(blocks),
            block_size=block_size,
            max_batch=max_batch,
            max_prefill_tokens=max_prefill_tokens,
            drafts=speculate,
            lookahead=modules,
        )
        self._adapters = Adapters(cast(nn.Module, model))
        self._runner = ModelRunner(
            model,
            self._adapters,
            blocks=blocks,
            block_size=block_size,
            max_batch=max_batch,
            row_blocks=math.ceil(min(model.max_positions, self.cache_capacity) / block_size),
            cache_dtype=cache_dtype,
            graphs=graphs,
            drafts=speculate,
        )
        self._sequences: dict[int, Sequence] = {}  # unfinished
        self._cancelled: list[TokenEvent] = []  # to be told by the next step
        self._ahead: RunningStep | None = None  # started by the step before
        self._next_id = 0
        self._generation_tokens = 0

    def warm_up(self) -> None:
        """Capture the decode graphs of all sizes now, so that no request waits for one later: some seconds on a GPU.

        Nothing to do elsewhere. What the kernels of prefill compile waits for its first use.
        """
        if self.has_work:
            raise RequestError("Engine.warm_up was called while requests are under way; call it before the first.")
        with torch.inference_mode(), self._evaluating():
            self._runner.warm_up()

    # Requests ----------------------------------------------------------------------------------------

    def add(
        self, prompt_ids: Ordered[int], params: SamplingParams | None = None, *, salt: str = "", adapter: str = ""
    ) -> int:
        """Queue a request; returns its id.

        salt: requests share cached prefixes only with requests of the same salt. Give each tenant its own.
        adapter: the loaded adapter that answers; "" is the model as it is. Any mixture of them runs in one batch.
        """
        params = params or SamplingParams()
        prompt = [int(token) for token in prompt_ids]
        problems = self._problems(prompt, params)
        if problems:
            raise RequestError(problems)
        sequence = Sequence(
            self._next_id,
            prompt,
            params,
            limit=min(len(prompt) + params.max_tokens, self.model.max_positions, self.cache_capacity),
            stop_ids=frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.eos_ids),
            salt=salt,
            adapter=self._adapters.number(adapter),
        )
        self._next_id += 1
        self._sequences[sequence.request_id] = sequence
        self._scheduler.waiting.append(sequence)
        return sequence.request_id

    def cancel(self, request_id: int) -> bool:
        """End a request now and free its blocks; the next step tells so. False: it had ended already."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._scheduler.cancel(request_id)
        if not self._sequences:
            self._ahead = None  # it was for those that are gone
        self._cancelled.append(TokenEvent(request_id, None, 0.0, "cancelled", sequence.cached_tokens))
        return True

    def step(self) -> list[TokenEvent]:
        """Give every running request a token (or several: see `speculate`), and prefill some of the waiting ones.

        When the model fails, the error is raised, all requests are in the queue again, and the cache is empty; the
        caller tries again or cancels.
        """
        with torch.inference_mode(), self._evaluating():
            step = self._ahead
            self._ahead = None
            try:
                if step is None:
                    step = self._runner.start(self._scheduler.plan())
                plan = step.plan
                further = self._scheduler.plan_ahead(plan) if self._runner.runs_ahead else None
                if further is not None:
                    self._ahead = self._runner.start(further)
                drawn = step.finish()
                if not math.isfinite(sum(token.logprob for row in drawn for token in row)):
                    sums = [sum(token.logprob for token in row) for row in drawn]
                    broken = [s.request_id for s, p in zip(plan.rows, sums, strict=True) if not math.isfinite(p)]
                    raise WorkError(f"The model's logits for requests {broken} are not finite; check its weights.")
            except BaseException:
                self._ahead = None
                self._scheduler.abandon_step()
                raise
        events = self._scheduler.commit(plan, drawn)
        self._generation_tokens += len(events)
        for event in events:
            if event.finish_reason:
                del self._sequences[event.request_id]
        if not self._sequences:
            self._ahead = None  # it was for those that are gone
        if self._cancelled:
            events = self._cancelled + events
            self._cancelled = []
        return events

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._sequences or self._cancelled)

    @property
    def stats(self) -> EngineStats:
        """Counts for metrics and logs."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.admitted),
            waiting=len(scheduler.waiting),
            cache_blocks_used=scheduler.manager.used,
            cache_blocks_total=scheduler.manager.blocks,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=scheduler.preemptions,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            draft_steps=scheduler.drafted_steps,
            draft_tokens=scheduler.drafted_tokens,
            accepted_at=tuple(scheduler.accepted_at),
        )

    def update_weights(self) -> None:
        """Call after the model's parameters changed in place.

        The prefix cache is dropped; requests under way keep their tokens and are prefilled again. Adapters were
        trained on the weights before: drop them first.
        """
        self._refuse_with_adapters("changed")
        self._ahead = None
        self._scheduler.new_weights()
        self._runner.weights_changed()

    def load_weights(self, source: Path | Mapping[str, Tensor]) -> None:
        """Other weights of the same model, from a model directory or by name, written over those there are.

        Addresses stay as they are, and so do CUDA graphs; beyond the weights there is no memory for a second model to
        be found. Otherwise as `update_weights`: requests under way go on with the new weights. Names and shapes are
        compared, with a `RequestError` that lists what does not match, before anything is written; that the rest of the
        two models' configs is the same is the caller's to know.
        """
        self._refuse_with_adapters("loaded")
        replace_weights(cast(nn.Module, self.model), source)
        self.update_weights()

    # Adapters ----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, directory: Path, base: Path | None = None) -> None:
        """Load a LoRA adapter (what a stage with `finetune: lora` leaves); requests name it in `add`.

        base: the model directory that the weights were loaded from. An adapter of other weights is refused, and where
        the weights were cast to a narrower dtype only their files tell. `RequestError` says all that is wrong.
        """
        self._adapters.load(name, directory, base)
        self._runner.layers_changed()

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter. `RequestError` while requests under way use it."""
        number = self._adapters.number(name)
        using = sum(sequence.adapter == number for sequence in self._sequences.values())
        if using:
            raise RequestError(
                f"The adapter '{name}' is used by {using} requests under way; finish them with step or cancel them "
                "first."
            )
        self._adapters.drop(name)
        self._runner.layers_changed()

    # Batches -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Ordered[Ordered[int]],
        params: SamplingParams | Ordered[SamplingParams] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        salt: str = "",
        adapter: str = "",
    ) -> list[Completion]:
        """Complete all prompts; completions come in the order of the prompts.

        One params serves all prompts, with seed + i for prompt i: copies of a prompt must not be copies of an answer.
        A list gives each prompt its own, seeds included. on_progress(done, total) is called when requests end.
        """
        if self.has_work:
            raise RequestError(
                f"Engine.generate was called while {len(self._sequences)} added requests are under way; "
                "finish them with step or cancel them first."
            )
        if params is None or isinstance(params, SamplingParams):
            base = params or SamplingParams()
            params = [dataclasses.replace(base, seed=base.seed + i) for i in range(len(prompts))]
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(params)} sampling parameters; give one or all.")
        problems = [
            f"Prompt {i}: {problem}"
            for i, (prompt, asked) in enumerate(zip(prompts, params, strict=True))
            for problem in self._problems(prompt, asked)
        ]
        if problems:
            raise RequestError(problems)

        ids = [self.add(prompt, p, salt=salt, adapter=adapter) for prompt, p in zip(prompts, params, strict=True)]
        sequences = [self._sequences[i] for i in ids]
        endings: dict[int, Any] = {}
        try:
            with self._evaluating():
                while self.has_work:
                    before = len(endings)
                    endings.update((e.request_id, e.finish_reason) for e in self.step() if e.finish_reason)
                    if on_progress and len(endings) > before:
                        on_progress(len(endings), len(ids))
        finally:
            for request_id in ids:
                if self.cancel(request_id):
                    self._cancelled.clear()
        return [
            Completion(
                i,
                s.tokens[s.prompt_length :],
                s.logprobs,
                endings[i],
                s.cached_tokens,
                s.scores,
                s.told_prompt_scores,
                s.forced if any(s.forced) else [],
            )
            for i, s in zip(ids, sequences, strict=True)
        ]

    # Inside ------------------------------------------------------------------------------------------

    def _problems(self, prompt: Ordered[int], params: SamplingParams) -> list[str]:
        """What makes a prompt or what is asked of its answer impossible, as sentences with numbers."""
        if not len(prompt):
            return ["the prompt is empty; expected at least one token (the beginning-of-sentence token will do)."]
        problems = []
        length, positions = len(prompt), self.model.max_positions
        if length >= positions:
            problems.append(
                f"the prompt has {length} tokens; the model has {positions} positions and needs one for its answer: "
                f"expected at most {positions - 1} tokens."
            )
        if length >= self.cache_capacity:
            problems.append(
                f"the prompt has {length} tokens; the whole cache holds {self.cache_capacity}: expected at most "
                f"{self.cache_capacity - 1} tokens, or a larger cache_tokens."
            )
        vocabulary = self.model.config.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            problems.append(f"the prompt holds token {wrong}; the model knows 0 to {vocabulary - 1}.")
        problems += [
            f"{name} names token {token}; the model knows 0 to {vocabulary - 1}."
            for name, token in params.named_tokens
            if token >= vocabulary
        ]
        if params.ruled and len(self.eos_ids | set(params.stop_ids)) >= vocabulary:
            problems.append(
                f"stop_ids names all of the {vocabulary} tokens that the model knows, and the answer is to have some "
                "before it ends: name fewer."
            )
        if params.grammar is not None and params.grammar.vocabulary > vocabulary:
            problems.append(
                f"the grammar was compiled for a tokenizer of {params.grammar.vocabulary} tokens; the model knows "
                f"{vocabulary}: compile it for the model's own tokenizer."
            )
        return problems

    def _refuse_with_adapters(self, what: str) -> None:
        if self._adapters:
            names = ", ".join(self._adapters.names)
            raise RequestError(
                f"The weights are {what} under the adapters {names}, which belong to those before; drop them first."
            )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, its GPU the present one (kernels start there), its results in the form that was
        asked for; as it was afterwards."""
        training = self.model.training
        if training:
            self.model.train(False)
        device = self._runner.device
        try:
            with (
                torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
                row_by_row() if self._batch_invariant else nullcontext(),
            ):
                yield
        finally:
            if training:
                self.model.train(True)
