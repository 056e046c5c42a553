"""From a conversation as clients write it to the ids of a prompt.

What clients may leave open is settled here: the outputs of tools are put in the order of their calls (the chat form
tells them apart by their order alone), and an answer that is to be continued is written behind the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepwright_core.chat import Thinking, opens_thinking
from deepwright_core.tokenizer import Tokenizer

from .calls import require_marks
from .protocol.chat import AssistantMessage, Message, SystemMessage, ToolMessage, text_of
from .protocol.tools import Tool
from .refusal import Refusal


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    thinking: Thinking = "auto",
    continues: AssistantMessage | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Ids of a conversation. continues: its last message, when the answer is to go on with that."""
    if tools:
        require_marks(tokenizer)
    conversation = [_plain(message) for message in in_order_of_calls(messages[:-1] if continues else messages)]
    # `strict` is for the grammar; the model was not trained to read it.
    described = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools] or None
    if continues is None:
        return tokenizer.chat(
            conversation, tools=described, thinking=thinking, add_generation_prompt=add_generation_prompt
        )
    text, thought = text_of(continues.content), continues.thought
    if thinking == "enabled" and text and not thought:
        raise Refusal(
            400, "thinking is enabled, but the message to be continued has begun its answer without reasoning_content.",
            param="thinking",
        )  # fmt: skip
    if thinking == "disabled" and thought:
        raise Refusal(
            400, "thinking is disabled, but the message to be continued holds reasoning_content.", param="thinking"
        )
    prompt = tokenizer.chat(conversation, tools=described, thinking=thinking)
    opened = opens_thinking(tokenizer, prompt)
    if thought:
        prompt += [] if opened else [tokenizer.mark_id("think_start")]
        prompt += _inside(tokenizer, thought)
        opened = True
    if text:
        prompt += [tokenizer.mark_id("think_end")] if opened else []
        prompt += _inside(tokenizer, text)
    return prompt


def _inside(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch([text], inside=True)[0]


def _plain(message: Message) -> dict[str, Any]:
    """A message as the chat form takes it. Thinking of earlier turns is left out: models are not trained on it."""
    role = "system" if isinstance(message, SystemMessage) else message.role
    plain: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.model_dump()} for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with each run of tools' outputs in the order of the calls before it.

    Refuses an output of no call, a second one of the same call, and a call without an output.
    """
    ordered: list[Message] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        ordered.append(message)
        place += 1
        calls = [call.id for call in message.tool_calls or ()] if isinstance(message, AssistantMessage) else []
        outputs: dict[str, ToolMessage] = {}
        while place < len(messages) and isinstance(output := messages[place], ToolMessage):
            if output.tool_call_id not in calls or output.tool_call_id in outputs:
                second = " once more" if output.tool_call_id in outputs else ""
                raise Refusal(
                    400,
                    f"messages.{place}.tool_call_id is '{output.tool_call_id}'{second}; the calls before it are "
                    f"{', '.join(calls) or 'none'}.",
                    param=f"messages.{place}.tool_call_id",
                )
            outputs[output.tool_call_id] = output
            place += 1
        missing = [call for call in calls if call not in outputs]
        if missing:
            raise Refusal(
                400, f"messages.{place - 1}: call '{missing[0]}' has no output; a message with role 'tool' must follow "
                "for each of tool_calls.", param="messages",
            )  # fmt: skip
        ordered += [outputs[call] for call in calls]
    return ordered
