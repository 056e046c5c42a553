"""What the files beside a tokenizer.json say about it: which tokens have a role, which end a text, the chat template.

`tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and `generation_config.json` are read, any of
them may be missing. Left out: a folder `chat_templates/` of further templates, and code that a config points to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNBOUNDED = int(1e30)  # what other programs write for "no limit"


@dataclass(frozen=True)
class Conventions:
    """How a tokenizer is meant to be used.

    names: role (`bos_token`, ...) -> how the token is spelt. further: other tokens that count as special.
    end_ids: tokens that end a generated text, beside the one for end. begins: whether a text begins with the token for
    begin; None: tokenizer.json alone says so. template: the chat template; tool_template: another one where tools are
    given.
    """

    names: dict[str, str] = field(default_factory=dict)
    further: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    begins: bool | None = None
    max_length: int = UNBOUNDED
    template: str | None = None
    tool_template: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Conventions:
        """From the files of a directory; `RequestError` with every problem found."""
        problems: list[str] = []
        config = _mapping(directory / CONFIG_FILE, problems)
        special = _mapping(directory / SPECIAL_FILE, problems)
        names = {role: _spelling(config[role] if role in config else special.get(role)) for role in ROLES}
        further = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        further = further.values() if isinstance(further, dict) else further if isinstance(further, list) else []
        ends = _mapping(directory / GENERATION_FILE, problems).get("eos_token_id")
        begins, longest = config.get("add_bos_token"), config.get("model_max_length")
        templates = _templates(config.get("chat_template"), directory / CONFIG_FILE, problems)
        if (directory / TEMPLATE_FILE).is_file():
            templates["default"] = _text(directory / TEMPLATE_FILE, problems)
        if problems:
            raise RequestError(problems)
        return cls(
            names={role: token for role, token in names.items() if token},
            further=tuple(token for token in map(_spelling, further) if token),
            end_ids=tuple(i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int),
            begins=begins if isinstance(begins, bool) else None,
            max_length=longest if type(longest) is int else UNBOUNDED,
            template=templates.get("default"),
            tool_template=templates.get("tool_use"),
        )

    def files(self) -> dict[str, str]:
        """Name -> content of the files that other programs, and `read`, read this from.

        The class is the one that takes tokenizer.json as it is, whatever the tokenizer's own class was.
        """
        # Roles without a token are written too: where they are missing, the class that transformers 5 takes beside a
        # qwen2 model adds "<|endoftext|>", an id that the model has no row for.
        roles: dict[str, Any] = {"unk_token": None, "pad_token": None, **self.names}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        if self.further:
            config["additional_special_tokens"] = list(self.further)
        config |= {
            "add_bos_token": bool(self.begins),
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.max_length,
        }
        written = {}
        if self.template is not None and self.tool_template is None:
            config["chat_template"] = self.template
            written[TEMPLATE_FILE] = self.template
        elif self.tool_template is not None:
            # A file for one of them would hide the other.
            both = {"default": self.template, "tool_use": self.tool_template}
            config["chat_template"] = [{"name": n, "template": t} for n, t in both.items() if t is not None]
        written[CONFIG_FILE] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        if self.end_ids:
            written[GENERATION_FILE] = json.dumps({"eos_token_id": list(self.end_ids)}, indent=2) + "\n"
        return written


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}.")
        return ""


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """The content of a JSON file that may be missing."""
    if not path.is_file():
        return {}
    before = len(problems)
    text = _text(path, problems)
    if len(problems) > before:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        problems.append(f"{path} is not valid JSON: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} holds a {type(content).__name__}; expected a mapping.")
        return {}
    return content


def _spelling(token: Any) -> str | None:
    """A token is written as its text, or as a mapping with its text in `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _templates(value: Any, path: Path, problems: list[str]) -> dict[str, str]:
    """A chat template is a text, or a list of texts with names."""
    if value is None or isinstance(value, str):
        return {} if value is None else {"default": value}
    named = value if isinstance(value, list) else []
    if named and all(isinstance(t, dict) and isinstance(t.get("template"), str) and "name" in t for t in named):
        return {str(t["name"]): t["template"] for t in named}
    problems.append(f"{path}: chat_template is a {type(value).__name__}; expected text or a list of named templates.")
    return {}
