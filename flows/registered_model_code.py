"""What MLflow runs to load a registered model and ask it: questions in, answers out.

A file of code beside safetensors instead of a pickled object. Answers are greedy; serving with streaming, sampling and
the OpenAI interface is `deepwright serve`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ReasoningModel(PythonModel):
    """Answers each question of a list; `params={"max_tokens": 256}` limits the length."""

    def load_context(self, context: Any) -> None:
        from deepwright_core.engine import Engine
        from deepwright_core.model.directory import load_model
        from deepwright_core.plugins import installed
        from deepwright_core.tokenizer import Tokenizer

        directory = Path(context.artifacts["model"])
        self.tokenizer = Tokenizer.load(directory)
        model = load_model(directory, installed().registry)
        self.engine = Engine(model, self.tokenizer.end_ids)

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        from deepwright_core.engine import SamplingParams

        limit = int((params or {}).get("max_tokens", 256))
        prompts = [self.tokenizer.chat([{"role": "user", "content": question}]) for question in model_input]
        sampling = SamplingParams(max_tokens=limit, temperature=0.0)
        return [self.tokenizer.decode(done.token_ids) for done in self.engine.generate(prompts, sampling)]


set_model(ReasoningModel())
