"""A registered model as MLflow loads it, and as the application of `mlflow models serve` answers for it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, pyfunc
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from starlette.testclient import TestClient

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.directory import load_model
from deepwright_core.plugins import installed
from deepwright_core.tokenizer import Tokenizer
from flows import mlflow_tracker, registered_model

_place = Path(__file__).parents[1] / "serve" / "conftest.py"
_spec = importlib.util.spec_from_file_location("serve_fixtures_for_models", _place)
assert _spec is not None and _spec.loader is not None
_serve: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_serve)
tokenizer, model_directory = _serve.tokenizer, _serve.model_directory

CHAT = {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}


@pytest.fixture(scope="module")
def loaded(database: bytes, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("registry")
    (root / "mlflow").mkdir()
    (root / "mlflow" / "mlflow.db").write_bytes(database)
    client: MlflowClient = mlflow_tracker.client_at(root, "")
    experiment = client.create_experiment("deepwright", artifact_location=(root / "artifacts").as_uri())
    run = client.create_run(experiment)
    registered_model.keep(client, run.info.run_id, model_directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pyfunc.load_model(f"{run.info.artifact_uri}/{registered_model.FOLDER}")


def greedy(directory: Path, prompt: list[int], length: int) -> str:
    tokenizer = Tokenizer.load(directory)
    engine = Engine(load_model(directory, installed().registry), tokenizer.end_ids)
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=length, temperature=0.0))
    return tokenizer.decode(done.token_ids)


def test_conversations_and_texts(loaded: Any, model_directory: Path, tokenizer: Tokenizer) -> None:
    chat = loaded.predict(CHAT, params={"max_tokens": 6})
    (choice,) = chat["choices"]
    assert choice["message"]["content"] == greedy(model_directory, tokenizer.chat(CHAT["messages"]), 6)
    assert choice["finish_reason"] == "length" and chat["usage"]["completion_tokens"] == 6
    text = loaded.predict({"prompt": "The answer"}, params={"max_tokens": 5})
    prompt = [*tokenizer.begin_ids, *tokenizer.encode("The answer")]
    assert text["choices"][0]["text"] == greedy(model_directory, prompt, 5)
    # Several rows at once; a seed makes drawing repeatable.
    drawn = {"max_tokens": 6, "temperature": 1.5, "seed": 11}
    many = [loaded.predict([CHAT, CHAT, CHAT], params=drawn) for _ in range(2)]
    assert len(many[0]) == 3 and many[0] == many[1]


def test_the_scoring_servers_application(loaded: Any, model_directory: Path, tokenizer: Tokenizer) -> None:
    client = TestClient(scoring_server.init(loaded))
    expected = greedy(model_directory, tokenizer.chat(CHAT["messages"]), 4)
    plain = client.post("/invocations", json={**CHAT, "max_tokens": 4})
    assert plain.json()["choices"][0]["message"]["content"] == expected
    table = client.post("/invocations", json={"dataframe_records": [CHAT, CHAT], "params": {"max_tokens": 4}})
    assert [r["choices"][0]["message"]["content"] for r in table.json()["predictions"]] == [expected, expected]
    for wrong, words in (
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0 must have a role"),
        ({**CHAT, "prompt": "and"}, "A row has messages and prompt"),
        ({"prompt": "and", "temperature": -1.0}, "temperature is -1"),
    ):
        refused = client.post("/invocations", json=wrong)
        assert refused.status_code == 400 and words in refused.json()["message"], refused.text


def test_it_says_what_it_takes(loaded: Any) -> None:
    assert loaded.metadata.signature.inputs.input_names() == ["messages", "prompt"]
    assert {param.name for param in loaded.metadata.signature.params} == {"max_tokens", "temperature", "top_p", "seed"}
    assert loaded.input_example["messages"][0]["role"] == "user"
    with pytest.raises(MlflowException, match="neither messages nor prompt"):
        loaded.predict({"question": "?"})
