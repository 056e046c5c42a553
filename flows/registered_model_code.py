"""What MLflow runs to load a registered model and ask it: conversations or texts in, answers out.

A row has `messages` (a conversation, as OpenAI's clients send it) or `prompt` (a text to go on with), and a table only
one of the two columns; one row gives one reply in OpenAI's form, several give a list of them. Under
`mlflow models serve` a body such as `{"messages": [{"role": "user", "content": "..."}]}` may be sent as it is.

A file of code beside safetensors instead of a pickled object. Left out: streaming, tools, structured output, keys and
limits; those are `deepwright serve`.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

ROLES = ("system", "user", "assistant")


class ReasoningModel(PythonModel):
    """Answers every row of its input together; `params` may hold max_tokens, temperature, top_p and seed."""

    def load_context(self, context: Any) -> None:
        from deepwright_core.engine import Engine
        from deepwright_core.model.directory import load_model
        from deepwright_core.plugins import installed
        from deepwright_core.tokenizer import Tokenizer
        from deepwright_serve.loading import Loading

        directory = Path(context.artifacts["model"])
        self.tokenizer = Tokenizer.load(directory)
        device, dtype = Loading().place()
        model = load_model(directory, installed().registry, device=device, dtype=dtype)
        self.engine = Engine(model, self.tokenizer.end_ids)
        # The engine is driven by one at a time.
        self.turn = threading.Lock()

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        from deepwright_core.chat import opens_thinking
        from deepwright_serve.answer import Answer, Continuation

        tokenizer = self.tokenizer
        prompts: list[list[int]] = []
        answers: list[Answer] = []
        for row in rows(model_input):
            if "messages" in row:
                prompts.append(tokenizer.chat(conversation(row["messages"])))
                answers.append(Answer(tokenizer, thinking=opens_thinking(tokenizer, prompts[-1])))
            else:
                prompts.append([*tokenizer.begin_ids, *tokenizer.encode(row["prompt"])])
                answers.append(Continuation(tokenizer))
        if not prompts:
            raise MlflowException.invalid_parameter_value("There is neither messages nor prompt; give one of the two.")
        reasons = self._generate(prompts, answers, params or {})
        replies = [
            reply(answer, reason, len(prompt)) for answer, reason, prompt in zip(answers, reasons, prompts, strict=True)
        ]
        return replies[0] if len(replies) == 1 else replies

    def _generate(self, prompts: list[list[int]], answers: Sequence[Any], params: Mapping[str, Any]) -> list[str]:
        """Fill the answers; why each has ended."""
        from deepwright_core.engine import SamplingParams
        from deepwright_core.errors import RequestError

        user = self.tokenizer.user_id
        seed = int(params.get("seed", -1))
        try:
            sampling = SamplingParams(
                max_tokens=int(params.get("max_tokens", 256)),
                temperature=float(params.get("temperature", 0.0)),
                top_p=float(params.get("top_p", 1.0)),
                seed=secrets.randbits(62) if seed < 0 else seed,
                stop_ids=() if user is None else (user,),
            )
            with self.turn:
                completions = self.engine.generate(prompts, sampling)
        except RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        for answer, done in zip(answers, completions, strict=True):
            for token in done.token_ids:
                answer.push(token)
            answer.finish()
        return ["length" if done.finish_reason == "length" else "stop" for done in completions]


def rows(model_input: Any) -> Iterator[dict[str, Any]]:
    """The rows of what MLflow hands over (a table, one row, or a list of rows), each with messages or a prompt."""
    if hasattr(model_input, "to_dict"):
        model_input = model_input.to_dict("records")
    for row in [model_input] if isinstance(model_input, Mapping) else model_input:
        given = {key: value for key, value in row.items() if key in ("messages", "prompt") and filled(value)}
        if len(given) != 1:
            raise MlflowException.invalid_parameter_value(
                f"A row has {' and '.join(given) or 'neither messages nor prompt'}; give it one of the two."
            )
        yield given


def filled(value: Any) -> bool:
    """Whether a cell of a table holds something: not None, not the number that stands for nothing."""
    return value is not None and not (isinstance(value, float) and value != value)


def conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages as the chat form takes them."""
    found = [dict(message) for message in messages]
    for place, message in enumerate(found):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise MlflowException.invalid_parameter_value(
                f"messages.{place} must have a role ({', '.join(ROLES)}) and a content that is a text."
            )
    if not found:
        raise MlflowException.invalid_parameter_value("messages is empty; give at least one.")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def reply(answer: Any, reason: str, prompt_tokens: int) -> dict[str, Any]:
    """One reply, in the form of a chat completion or of a completion."""
    from deepwright_serve.answer import Continuation

    if isinstance(answer, Continuation):
        choice: dict[str, Any] = {"index": 0, "text": answer.content, "finish_reason": reason}
    else:
        message = {"role": "assistant", "content": answer.content, "reasoning_content": answer.reasoning}
        choice = {"index": 0, "message": message, "finish_reason": reason}
    total = prompt_tokens + answer.tokens
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}
    return {"choices": [choice], "usage": usage}


set_model(ReasoningModel())
