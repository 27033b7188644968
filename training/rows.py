"""One row as people have it -> one form: ``messages`` with role and content each, or ``text``; see docs/data.md.

What shapes the prompt beside the messages is kept under ``tools``, ``documents`` and ``chat_template_kwargs``, as the
chat template takes them.
"""

import json
from typing import Any

from .sources import BadRow, is_null, parse_cell

CHATS = ("messages", "conversations", "conversation")
# (prompt, answer) columns, the first pair that a row has; a prompt alone is a chat that waits for its answer.
PAIRS = (
    ("prompt", ("completion", "response", "answer", "output")),
    ("instruction", ("output", "response", "completion", "answer")),
    ("question", ("answer", "response", "output")),
    ("query", ("response", "answer", "output")),
)
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
SYSTEM = ("system", "system_prompt")
SWITCHES = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str}  # columns that are such options
NOT_OF_TEMPLATES = {"conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message"}
NOT_OF_TEMPLATES |= {"chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
NOT_OF_TEMPLATES |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "tools"}
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
TEXT_PARTS = (None, "text", "input_text", "output_text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def normal(raw: dict) -> dict:
    """A row in the one form; columns that mean nothing here stay.

    Raises:
        BadRow: a row that has neither, or something in it that no text is.
    """
    row = {key: value for key, value in raw.items() if not is_null(value)}
    found = _chat_of(row)
    if found is None:
        if isinstance(row.get("text"), str) and row["text"]:
            return {key: value for key, value in row.items() if key not in CHATS}
        raise BadRow(
            f"expected a non-empty 'messages' list or 'text', got the keys {sorted(map(str, row))}. Rename or convert "
            "the column first (docs/data.md)."
        )
    used, messages = found
    rest = {key: value for key, value in row.items() if key not in used and key not in TEMPLATE_COLUMNS}
    return {**rest, "messages": messages, **_template_options(row)}


def options_of(row: dict) -> dict:
    """What the chat template is given beside the messages."""
    named = {key: row[key] for key in ("tools", "documents") if row.get(key)}
    return {**named, **row.get("chat_template_kwargs", {})}


# -- chats -------------------------------------------------------------------------------------------------------------


def _chat_of(row: dict) -> tuple[set[str], list[dict]] | None:
    """(columns that it was made from, messages), or None for a row without a chat."""
    for key in CHATS:
        if key not in row or (row[key] == [] and row.get("text")):
            continue
        chat = _parsed(row, key) if _looks_nested(row[key]) else row[key]
        if not isinstance(chat, list) or not chat:
            raise BadRow(
                f"expected a non-empty 'messages' list or 'text', got {row[key]!r:.80} as {key!r} beside the keys "
                f"{sorted(map(str, row))}. Rename or convert the column first."
            )
        return {*CHATS, *SYSTEM} & row.keys(), _with_system(row, normal_messages(chat))
    if isinstance(row.get("turns"), list) and row["turns"] and all(isinstance(turn, str) for turn in row["turns"]):
        return {"turns", *SYSTEM}, _with_system(row, [{"role": "user", "content": turn} for turn in row["turns"]])
    return _pair_of(row)


def _with_system(row: dict, messages: list[dict]) -> list[dict]:
    """The messages after the system prompt of a column, unless they have one."""
    given = next((row[key] for key in SYSTEM if isinstance(row.get(key), str) and row[key].strip()), None)
    if given is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": given}, *messages]


def _pair_of(row: dict) -> tuple[set[str], list[dict]] | None:
    """As :func:`_chat_of`, of a row with columns of a prompt and an answer."""
    for asked, answered in PAIRS:
        answer = next((key for key in answered if key in row), None)
        if asked not in row or (answer is None and row.get("text")):
            continue
        prompt = _side(row[asked], "user", asked)
        if asked == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
            prompt[-1]["content"] = f"{prompt[-1]['content']}\n\n{row['input']}"
        earlier = [
            {"role": role, "content": text}
            for turn in row.get("history", [])
            for role, text in zip(("user", "assistant"), turn)
        ]
        messages = [*earlier, *prompt, *(_side(row[answer], "assistant", answer) if answer else [])]
        used = {asked, answer or asked, "history", *SYSTEM, *(["input"] if asked == "instruction" else [])}
        return used, _with_system(row, normal_messages(messages))
    return None


def _side(value: object, role: str, column: str) -> list[dict]:
    """A prompt or an answer: a text, or messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column!r} must be a text or a list of messages, got {value!r:.80}.")
    return normal_messages(value)


def normal_messages(chat: list) -> list[dict]:
    """Messages with the roles and keys that chat templates know. Raises BadRow."""
    return [normal_message(given) for given in chat]


def normal_message(given: Any) -> dict:
    """One message: roles of every dialect, parts joined, calls of tools with parsed arguments. Raises BadRow."""
    if not isinstance(given, dict):
        raise BadRow(f"a message is {{'role': text, 'content': text}}, got {given!r:.200}.")
    message = {key: value for key, value in given.items() if not is_null(value)}
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None and (not isinstance(role, str) or not role or "from" in given):
        raise BadRow(
            f"a message is {{'role': text, 'content': text}} or {{'from': text, 'value': text}} with one of "
            f"{', '.join(ROLES)}, got {given!r:.200}."
        )
    if known == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(content)}
    thought = next((text for key in THOUGHTS if (text := message.pop(key, None)) and isinstance(text, str)), None)
    if isinstance(content, list):
        content, thinking = _join(content)
        thought = thought or thinking
    calls = message.pop("tool_calls", None) or message.pop("function_call", None)
    content = message.pop("refusal", None) if content is None else content
    if known == "tool" and content is not None and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)  # what a tool gave back, as an object
    if not isinstance(content, str) and not (content is None and known == "assistant" and (calls or thought)):
        raise BadRow(f"a message is {{'role': text, 'content': text}}, got {given!r:.200}.")
    if content is None and not calls:
        content = ""
    result = {"role": known or role, "content": content, **message}
    if thought:
        result["reasoning_content"] = thought
    if calls:
        result["tool_calls"] = _calls(calls)
    return result


def _join(parts: list) -> tuple[str, str]:
    """(text, thought) of content given as parts. Raises BadRow for parts that are no text."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in TEXT_PARTS and isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str):
            thoughts.append(part.get(kind, part.get("text")))
        else:
            what = f"a part of type {kind!r}" if kind else f"the part {part!r:.80}"
            raise BadRow(f"its content holds {what}; only text can be learned from.")
    return "".join(texts), "".join(thoughts)


def _calls(given: Any) -> list[dict]:
    """Calls of tools in OpenAI's form, with their arguments parsed, as chat templates take them. Raises BadRow."""
    if isinstance(given, str):
        try:
            given = parse_cell(given)
        except ValueError as error:
            raise BadRow(f"a call of a tool {error}.") from None
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"a call of a tool is {{'name': text, 'arguments': object}}, got {call!r:.200}.")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments) if arguments.strip() else {}
            except ValueError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


# -- options of the template -------------------------------------------------------------------------------------------


def _looks_nested(value: object) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def _parsed(row: dict, key: str) -> Any:
    """A column's list or object, which tables and mixed data sets hold as text. Raises BadRow."""
    value = row.get(key)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_cell(value)
    except ValueError as error:
        raise BadRow(f"{key!r} {error}.") from None


def _template_options(row: dict) -> dict:
    options: dict[str, Any] = {}
    tools = _parsed(row, "tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"'tools' must be a list of JSON objects, got {tools!r:.80}.")
    if tools:  # OpenAI's older form names the functions alone
        options["tools"] = [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]
    documents = _parsed(row, "documents") if _looks_nested(row.get("documents")) else row.get("documents")
    if documents and isinstance(documents, list):
        options["documents"] = documents
    given = _parsed(row, "chat_template_kwargs") or {}
    if not isinstance(given, dict) or NOT_OF_TEMPLATES & given.keys():
        raise BadRow(f"'chat_template_kwargs' must be an object of the template's own options, got {given!r:.80}.")
    switches = {key: row[key] for key, kind in SWITCHES.items() if isinstance(row.get(key), kind)}
    if switches or given:
        options["chat_template_kwargs"] = {**switches, **given}
    return options
