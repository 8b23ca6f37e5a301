"""One row -> text, in segments that say which part the model has to learn.

`prompt_answer` renders two jinja templates, `alpaca` three columns, `text` one column, `messages` a conversation
through the tokenizer's own chat template. Templates run in jinja's sandbox with the settings that lm-eval uses for its
prompts (a trailing newline is kept): a prompt copied from a benchmark is the benchmark's, character by character. An
undefined column, or a null one, is an error that names the row: jinja would render the word "None".
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from loramoe_train.errors import ConfigError, DataError, nearest
from loramoe_train.schema.data import TaskConfig

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# format -> the columns that it reads, by role; `columns` of the task renames them
COLUMNS = {
    "messages": {"messages": "messages"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output"},
    "text": {"text": "text"},
    "prompt_answer": {},
}
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Segment:
    """A stretch of text, and whether it is what the model shall produce."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Rendered:
    """The text of one example.

    `special` asks for the tokens that the tokenizer puts before any text (a chat template writes them itself).
    `encoded` holds (token ids, supervised) instead of segments where the chat template itself marks the assistant.
    """

    segments: tuple[Segment, ...]
    special: bool = True
    encoded: tuple[list[int], list[bool]] | None = None


class _Null(Exception):
    """Its text says what cannot be printed."""


def _refuse_null(value: Any) -> Any:
    """Jinja's finalize: called with every printed value. Lists and objects print as Python shows them, so what must not
    be printed must not lie inside them either."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise _Null("null" if value is None or math.isnan(value) else "infinite")
    if isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            _refuse_null(entry)
    return value


_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null, autoescape=False
)


class Template:
    """A jinja template over the columns of a row; `key` is its place in the config, for messages."""

    def __init__(self, source: str, *, key: str) -> None:
        self.key = key
        try:
            self._template = _environment.from_string(source)
            self._names = meta.find_undeclared_variables(_environment.parse(source))
        except TemplateSyntaxError as error:
            raise ConfigError(f"{key}: not a jinja template ({error.message}, line {error.lineno})") from error
        # a text without an expression is most likely a format string with {column}; "" is an unconditional prompt
        if source and not self._names:
            raise ConfigError(f"{key}={source!r} uses no column; write columns as {{{{ column }}}}")

    def __call__(self, row: Row, where: str) -> str:
        """The text. Raises DataError naming `where`."""
        return _guarded(lambda: self._template.render(row), row, where, key=self.key, names=self._names)


class Predicate:
    """A jinja expression over the columns of a row, for `source.keep`."""

    def __init__(self, source: str, *, key: str) -> None:
        self.key = key
        try:
            self._expression = _environment.compile_expression(source, undefined_to_none=False)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{key}={source!r}: not a jinja expression ({error.message})") from error

    def __call__(self, row: Row, where: str) -> bool:
        return _guarded(lambda: bool(self._expression(row)), row, where, key=self.key, names=())


def _guarded(call: Callable[[], Any], row: Row, where: str, *, key: str, names: Any) -> Any:
    """Run a template; whatever goes wrong inside becomes one line about the row or the template."""
    try:
        return call()
    except _Null as error:
        nulls = [name for name in sorted(names) if name in row and row[name] is None]
        what = f"column '{nulls[0]}' is null" if nulls else f"a value is {error}"
        raise DataError(f"{where}: {what}, but {key} prints it; leave such rows out with source.keep") from None
    except UndefinedError as error:
        match = re.fullmatch(r"'(.+)' is undefined", str(error.message))
        near = nearest(match[1], row) if match else f"; columns: {', '.join(row)}"
        what = f"has no column '{match[1]}'" if match else str(error.message)[:200]  # it quotes the row
        raise DataError(f"{where}: {what}, which {key} uses{near}") from error
    except SecurityError as error:
        raise ConfigError(f"{key}: not allowed in a template ({error.message})") from error
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,  # of a macro that calls itself
    ) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{where}: {key} fails on this row ({type(error).__name__}: {first})") from error


class Renderer:
    """Turns the rows of one task into text. Raises ConfigError when the task's keys do not fit its format."""

    def __init__(self, name: str, task: TaskConfig, tokenizer: Any) -> None:
        self.name, self.key = name, f"data.definitions.{name}"
        self._tokenizer = tokenizer
        known = COLUMNS[task.format]
        for role in task.columns:
            if role not in known:
                near = nearest(role, known) or "; this format has none"
                raise ConfigError(f"{self.key}.columns.{role}: format {task.format} has no such column{near}")
        self._columns = {**known, **task.columns}
        self.render: Callable[[Row, str], Rendered] = getattr(self, f"_render_{task.format}")
        getattr(self, f"_prepare_{task.format}", lambda task: _refuse_templates(self.key, task))(task)

    def __call__(self, row: Row, where: str) -> Rendered:
        """The text of a row. Raises DataError naming `where` (file:line), also when there is nothing to learn in it."""
        rendered = self.render(row, where)
        learned = rendered.encoded is not None or any(s.supervised and s.text.strip() for s in rendered.segments)
        if not learned:
            raise DataError(f"{where}: nothing to learn: the answer of task {self.name} is empty for this row")
        for segment in rendered.segments:
            _check_text(segment.text, where)
        return rendered

    def _prepare_prompt_answer(self, task: TaskConfig) -> None:
        for part in ("prompt", "answer"):
            if getattr(task, part) is None:
                raise ConfigError(f"{self.key}.{part} is missing; format prompt_answer needs a jinja template there")
        self._prompt = Template(str(task.prompt), key=f"{self.key}.prompt")
        self._answer = Template(str(task.answer), key=f"{self.key}.answer")

    def _render_prompt_answer(self, row: Row, where: str) -> Rendered:
        return _pair(self._prompt(row, where), self._answer(row, where))

    def _render_alpaca(self, row: Row, where: str) -> Rendered:
        instruction = self._text(row, "instruction", where)
        # most rows have no input; an absent column or null means the same as ""
        given = row.get(self._columns["input"])
        extra = f"### Input:\n{given.strip()}\n\n" if isinstance(given, str) and given.strip() else ""
        prompt = f"### Instruction:\n{instruction.strip()}\n\n{extra}### Response:\n"
        return _pair(prompt, self._text(row, "output", where))

    def _render_text(self, row: Row, where: str) -> Rendered:
        return _pair("", self._text(row, "text", where))

    def _text(self, row: Row, role: str, where: str) -> str:
        column = self._columns[role]
        value = self._value(row, role, where)
        if not isinstance(value, str):
            raise DataError(f"{where}: column '{column}' is {type(value).__name__}, expected text (role {role})")
        return value

    def _value(self, row: Row, role: str, where: str) -> Any:
        column = self._columns[role]
        if column not in row:
            raise DataError(f"{where}: has no column '{column}' (role {role} of {self.key}){nearest(column, row)}")
        if row[column] is None:
            raise DataError(f"{where}: column '{column}' is null; leave such rows out with source.keep")
        return row[column]

    def _prepare_messages(self, task: TaskConfig) -> None:
        _refuse_templates(self.key, task)
        if not getattr(self._tokenizer, "chat_template", None):
            raise ConfigError(
                f"{self.key}.format=messages: the model's tokenizer has no chat template; "
                "use format prompt_answer, or a chat model"
            )
        self._marks_generation = bool(GENERATION_BLOCK.search(str(self._tokenizer.get_chat_template())))

    def _render_messages(self, row: Row, where: str) -> Rendered:
        messages = self._conversation(row, where)
        if self._marks_generation:
            return Rendered((), special=False, encoded=self._marked(messages, where))
        # What the model is shown before its turn is the conversation so far plus the generation prompt; so the turn is
        # what the template adds to exactly that.
        segments, done = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._chat(messages[:index], where, add_generation_prompt=True)
            after = self._chat(messages[: index + 1], where)
            if not (before.startswith(done) and after.startswith(before)):
                raise ConfigError(
                    f"{where}: the tokenizer's chat template rewrites earlier turns, so the assistant's text cannot be "
                    f"found in it (turn {index + 1}); mark it with {{% generation %}} in the template, or keep one "
                    "assistant turn per row"
                )
            segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
            done = after
        return Rendered(tuple(segments), special=False)

    def _conversation(self, row: Row, where: str) -> list[dict[str, Any]]:
        """The messages up to the last assistant turn; what follows it cannot be learned from."""
        messages = self._value(row, "messages", where)
        column = self._columns["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: column '{column}' must be a non-empty list of messages")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or "role" not in message or "content" not in message:
                raise DataError(f"{where}: message {number} of '{column}' must be an object with role and content")
            if message["role"] not in ROLES:
                near = nearest(message["role"], ROLES)
                raise DataError(f"{where}: message {number} of '{column}' has role '{message['role']}'{near}")
            if not isinstance(message["content"], str):
                raise DataError(f"{where}: message {number} of '{column}' has content that is not text")
            _check_text(message["content"], where)
            if message["role"] == "assistant" and not message["content"].strip():
                raise DataError(
                    f"{where}: message {number} of '{column}': the assistant says nothing; nothing to learn"
                )
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise DataError(f"{where}: '{column}' has no assistant message, so nothing to learn")
        return messages[: last + 1]

    def _chat(self, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
        return self._apply(messages, where, tokenize=False, **options)

    def _marked(self, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[bool]]:
        made = self._apply(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]

    def _apply(self, messages: list[dict[str, Any]], where: str, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            first = (str(error).splitlines() or [""])[0][:200]
            raise DataError(f"{where}: the tokenizer's chat template refuses this conversation ({first})") from error


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, no tokenizer can take it
        half = f"{ord(text[error.start]):04x}"
        raise DataError(f"{where}: holds half of a surrogate pair (\\u{half}), which is not text") from error


def _pair(prompt: str, answer: str) -> Rendered:
    return Rendered((Segment(prompt, False), Segment(answer, True)))


def _refuse_templates(key: str, task: TaskConfig) -> None:
    for part in ("prompt", "answer"):
        if getattr(task, part) is not None:
            raise ConfigError(f"{key}.{part} is set, but format {task.format} reads columns; remove it")
