"""Penalties against their definitions, written out token by token, and against transformers'."""

from __future__ import annotations

import random

import pytest
import torch

from deepwright_core.engine import SamplingParams
from deepwright_core.engine.penalties import TokenCounts, penalised
from deepwright_core.engine.sequence import Drawn, Sequence

VOCABULARY = 11


def sequence(request_id: int, prompt: list[int], answer: list[int]) -> Sequence:
    made = Sequence(request_id, list(prompt), SamplingParams(), limit=99, stop_ids=frozenset(), salt="", adapter=0)
    for token in answer:
        made.append(Drawn(token, 0.0))
    return made


def test_penalties_are_their_definitions() -> None:
    draw = random.Random(0)
    sequences = [
        sequence(n, [draw.randrange(VOCABULARY) for _ in range(4)], [draw.randrange(VOCABULARY) for _ in range(n * 3)])
        for n in range(5)
    ]
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    repetition, presence, frequency = [1.0, 1.3, 0.7, 2.0, 1.0], [0.0, 0.5, -1.0, 0.0, 2.0], [0.0, 0.25, 1.5, -0.5, 0.0]
    got = penalised(
        logits,
        *TokenCounts(VOCABULARY, torch.device("cpu")).of(sequences),
        repetition_P=torch.tensor(repetition),
        presence_P=torch.tensor(presence),
        frequency_P=torch.tensor(frequency),
    )
    for row, one in enumerate(sequences):
        answer = one.tokens[one.prompt_length :]
        for token in range(VOCABULARY):
            want = float(logits[row, token])
            if token in one.tokens:
                want = want / repetition[row] if want > 0 else want * repetition[row]
            want -= presence[row] * (token in answer) + frequency[row] * answer.count(token)
            assert float(got[row, token]) == pytest.approx(want, abs=1e-6)


def test_repetition_is_that_of_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    ids = torch.tensor([[1, 4, 4, 7, 2], [0, 0, 0, 9, 10]])
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for penalty in (0.6, 1.0, 1.7):
        got = penalised(
            logits,
            *TokenCounts(VOCABULARY, torch.device("cpu")).of(
                [sequence(n, r[:3], r[3:]) for n, r in enumerate(ids.tolist())]
            ),
            repetition_P=torch.full((2,), penalty),
            presence_P=torch.zeros(2),
            frequency_P=torch.zeros(2),
        )
        want = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_counts_follow_sequences_that_grow_leave_come_back_and_change_places() -> None:
    draw = random.Random(2)
    counts = TokenCounts(VOCABULARY, torch.device("cpu"))
    everybody = [sequence(n, [draw.randrange(VOCABULARY)] * (n % 3 + 1), []) for n in range(20)]
    for _ in range(30):
        here = draw.sample(everybody, draw.randrange(1, 20))
        answer_PV, prompt_PV = counts.of(here)
        for row, one in enumerate(here):
            answer = one.tokens[one.prompt_length :]
            assert answer_PV[row].tolist() == [answer.count(token) for token in range(VOCABULARY)]
            assert prompt_PV[row].tolist() == [token in one.tokens[: one.prompt_length] for token in range(VOCABULARY)]
        for one in draw.sample(everybody, 10):
            for _ in range(draw.randrange(4)):
                one.append(Drawn(draw.randrange(VOCABULARY), 0.0))
