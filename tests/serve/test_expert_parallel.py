"""What `deepwright serve --expert-parallel` refuses; tests/e2e has the ranks themselves, which need a mixture."""

from __future__ import annotations

import pytest

from deepwright_core.errors import RequestError
from deepwright_serve.expert_parallel import refuse_beside
from deepwright_serve.loading import Loading


def test_what_needs_more_of_the_other_ranks_is_refused() -> None:
    loading = Loading(replicas=2, speculate=1, batch_invariant=True)
    with pytest.raises(RequestError) as refused:
        refuse_beside(loading, adapters=True, admin=True)
    assert len(refused.value.problems) == 5
    refuse_beside(Loading(), adapters=False, admin=False)
