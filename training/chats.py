"""A conversation in a tokenizer's chat template: the prompt of a turn, and what the target would write after it."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .sources import BadRow

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A thought's opening tag at the end of a generation prompt, and a whole thought at the start of an answer.
OPENED = re.compile(r"(<(?:[\w-]+:)?think(?:ing)?>|\[THINK\])\s*$")
THOUGHT = re.compile(
    r"\s*(?:<(?:[\w-]+:)?think(?:ing)?>|\[THINK\])?(.*?)(?:</(?:[\w-]+:)?think(?:ing)?>|\[/THINK\])\s*", re.S
)
# What a template may raise about a conversation: its own errors, and what Python says of values it did not expect.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class Answered(NamedTuple):
    """A text with answers of the target.

    Attributes:
        text: a conversation, or its beginning, in the chat template.
        spans: (start, end) in characters of each answer with its end-of-turn token, in order.
        messages: how many of them the text is the rendering of; None: of none.
    """

    text: str
    spans: list[tuple[int, int]]
    messages: int | None


class Chat:
    """Messages and the options of the template, rendered turn by turn.

    Args:
        messages: as :func:`ppow.training.rows.normal` gives them.
        options: of the chat template: tools, documents and its own.
        tokenizer: owner of the chat template.

    Raises:
        BadRow: the template refuses the conversation.
    """

    def __init__(self, messages: list[dict], options: dict, tokenizer: PreTrainedTokenizerBase):
        self.messages, self.options, self.tokenizer = messages, options, tokenizer
        self.template = tokenizer.get_chat_template(tools=options.get("tools"))
        self.form, self.whole = self._choose_form()

    def render(self, count: int | None = None, prompt: bool = False) -> str:
        """The first ``count`` messages as text, behind them the generation prompt if asked for."""
        if not prompt and count in (None, len(self.messages)):
            return self.whole
        try:
            return self._apply(self.form, count, tokenize=False, add_generation_prompt=prompt)
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None

    def marked(self, count: int | None = None) -> tuple[list[int], list[int]]:
        """(ids, 1 inside the template's generation blocks) of the first ``count`` messages."""
        try:
            encoded = self._apply(self.form, count, return_dict=True, return_assistant_tokens_mask=True)
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None
        return encoded["input_ids"], encoded["assistant_masks"]

    def has_blocks(self) -> bool:
        """Whether the template marks the answers itself."""
        return GENERATION_BLOCK.search(self.template) is not None

    def knows_thoughts(self) -> bool:
        """Whether the template has a thought's tag, so that its target writes thoughts."""
        return re.search(r"think(ing)?>|\[/?THINK\]", self.template) is not None

    # -- answers -------------------------------------------------------------------------------------------------------

    def answers(self, cut: bool = False) -> Iterator[Answered]:
        """Texts that the target writes in this conversation, and where in them it writes.

        Most templates give one text with all answers. Where a template shows an earlier answer otherwise than it was
        written (without its thought, say), that answer has a text of its own, which ends with it.

        Args:
            cut: the last answer was cut short: the end of its turn is not the target's.

        Raises:
            BadRow: an answer cannot be found, or the template does not write its calls of tools.
        """
        texts: list[Answered] = []
        places = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        for index in reversed(places):
            if self.messages[index].get("weight") == 0:
                continue  # by OpenAI's convention not to be learned
            answer = self._answer(index, cut and index == places[-1])
            if answer is None:
                continue
            text, start, end, count = answer
            home = next((found.spans for found in texts if found.text.startswith(text[:end])), None)
            if home is None:
                texts.append(Answered(text, [(start, end)], count))
            else:
                home.append((start, end))
        for found in reversed(texts):
            yield found._replace(spans=sorted(found.spans))

    def _answer(self, index: int, cut: bool) -> tuple[str, int, int, int | None] | None:
        """(text, start, end, messages rendered) of one answer; None where nobody asked for it."""
        asked = any(message["role"] in ("user", "tool") for message in self.messages[:index])
        try:
            before = self.render(index, prompt=True) if index else ""
        except BadRow:
            if asked:
                raise
            before = ""
        if not before:
            return None
        text = self.render(index + 1)
        start = len(os.path.commonprefix((before, text)))
        # A generation prompt may say more than the template shows of an answer, but all before it has to be there.
        if start < len(before) and (start == 0 or start < len(os.path.commonprefix((before, self.render(index))))):
            raise BadRow(
                f"cannot find answer {index} in the rendered conversation, because the chat template changes earlier "
                "turns. Mark the answers with {% generation %} ... {% endgeneration %} in the template."
            )
        opened = OPENED.search(before)
        if opened and start < opened.end() and not text.startswith(opened[1], opened.start()):
            start = min(start, opened.start())  # whatever the answer's first letters have in common with the tag
        self._check_calls(index, text[start:])
        thought = self._hidden_thought(index, text[start:], opened and opened[1], cut)
        if thought is None:
            return text, start, self._end(text, start, cut), index + 1
        rest = THOUGHT.sub("", text[start:], count=1) if THOUGHT.match(text[start:]) else text[start:]
        rest = rest.lstrip().removeprefix(opened[1]).lstrip() if opened else rest.lstrip()
        text, start = before + thought + rest, len(before)
        return text, start, self._end(text, start, cut), None

    def _end(self, text: str, start: int, cut: bool) -> int:
        """Where an answer ends: the line break after an end-of-turn token is the template's, never the target's."""
        stripped, specials = text[start:].rstrip(), self.tokenizer.all_special_tokens
        ending = next((token for token in specials if token and stripped.endswith(token)), None)
        if cut and ending:
            stripped = stripped.removesuffix(ending).rstrip()
        return start + len(stripped) if ending or cut else len(text)

    def _hidden_thought(self, index: int, shown: str, opened: str | None, cut: bool) -> str | None:
        """The thought before an answer as the target wrote it, if there is one that the template does not show."""
        if not self.knows_thoughts():
            return None
        message = self.messages[index]
        content, thought = message["content"] or "", message.get("reasoning_content", "").strip()
        found = THOUGHT.match(content)
        inside = thought or (found[1].strip() if found else "")
        tag = opened or ("[THINK]" if "[THINK]" in self.template else "<think>")
        closing = f"\n{tag[0]}/{tag[1:]}\n\n"
        if cut and not found and not shown.lstrip().startswith(tag) and opened and not thought:
            return ""  # cut short in the thought that the prompt opened
        if cut and thought and not content:
            closing = ""
        elif not inside or inside in shown:
            return None
        written = content[: found.end()] if found and not thought else f"{tag}\n{thought}{closing}"
        return written.lstrip().removeprefix(opened).lstrip("\n") if opened else written

    def _check_calls(self, index: int, shown: str) -> None:
        names = [call["function"]["name"] for call in self.messages[index].get("tool_calls", ())]
        if missing := [name for name in names if name not in shown]:
            raise BadRow(f"the chat template does not write the call of {missing[0]!r}, so nothing would teach it.")

    # -- forms ---------------------------------------------------------------------------------------------------------

    def _choose_form(self) -> tuple[Callable[[dict], dict], str]:
        """How this template takes content: as it is, with empty text for none, or (image-text models) as parts.

        The first form that is taken and shows what the user says; a template that reads parts shows nothing of a text.
        With it comes the conversation in that form.
        """
        taken: list[tuple[Callable[[dict], dict], str]] = []
        failed: list[Exception] = []
        said = [m["content"].strip() for m in self.messages if m["role"] == "user" and m["content"]]
        for form in (_plain, _filled, _in_parts):
            try:
                text = self._apply(form, None, tokenize=False)
            except TEMPLATE_ERRORS as error:
                failed.append(error)
                continue
            if all(content in text for content in said):
                return form, text
            taken.append((form, text))
        if not taken:
            raise _refused(failed[0])
        return taken[0]

    def _apply(self, form: Callable[[dict], dict], count: int | None, **how: bool) -> Any:
        messages = [form(message) for message in self.messages[:count]]
        return self.tokenizer.apply_chat_template(messages, **how, **self.options)


def _refused(error: Exception) -> BadRow:
    return BadRow(f"the tokenizer's chat template refuses this conversation ({error}).")


def _plain(message: dict) -> dict:
    """A message as templates know it; content that is none is missing, and a thought has the names that are in use."""
    known = {key: value for key, value in message.items() if value is not None and key != "weight"}
    if thought := message.get("reasoning_content"):
        known |= {"reasoning": thought, "thinking": thought}
    return known


def _filled(message: dict) -> dict:
    return {"content": "", **_plain(message)}


def _in_parts(message: dict) -> dict:
    return {**_plain(message), "content": [{"type": "text", "text": message["content"] or ""}]}
