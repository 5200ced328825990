"""`meg chat`: a conversation with an edited model in the terminal, and edits on the fly."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from meg_kernels.cli.tables import console, errors, print_error
from meg_kernels.conversation import Message, has_chat
from meg_kernels.facts import Fact

if TYPE_CHECKING:
    from meg_kernels.editing.editor import MeGEditor
    from meg_kernels.routing.edits import Edits
    from meg_kernels.routing.router import Routing

COMMANDS = {
    "/why": "which fact the last question was taken for, with its score",
    "/base": "the base model's answer to the last question",
    "/edit": '"question" "answer": teach it a fact now',
    "/undo": "take the last /edit back",
    "/save": "keep the edits in the folder",
    "/new": "begin another conversation",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}


@dataclass
class Chat:
    """A conversation with an edited model.

    Args:
        editor: of the model; its tokenizer has a chat template.
        folder: where `/save` keeps the edits.
        max_new_tokens: of each answer.
        messages: what was said so far.
    """

    editor: MeGEditor
    folder: Path
    max_new_tokens: int | None = None
    messages: list[Message] = field(default_factory=list)
    # What was edited before each /edit, and its question.
    _before: list[tuple[Edits, str]] = field(default_factory=list)
    _saved: Edits | None = None
    _warned: bool = False
    _routing: Routing | None = None  # of the last question

    def __post_init__(self) -> None:
        if not has_chat(self.editor.tokenizer):
            raise ValueError(
                f"the tokenizer of {self.editor.name!r} has no chat template: it is no model for "
                "conversations; ask it with meg ask"
            )
        self._saved = self.editor.edits

    def run(self, read: Callable[[str], str] = input) -> None:
        """Read what the user says, line by line, until the end."""
        about = f"{len(self.editor.facts)} facts are edited in {self.editor.name}"
        console.print(f"{about}; /help lists what else you can type", markup=False, style="dim")
        while True:
            try:
                line = read("you: ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                break
            if line and not self.take(line):
                break
        if self.editor.edits is not self._saved:
            errors.print("[yellow]edits were not saved[/]")

    def take(self, line: str) -> bool:
        """Do what a line says; False if it ends the conversation."""
        word, *_ = line.split(maxsplit=1)
        if word == "/quit":
            return self._stays()
        self._warned = False
        verbs: dict[str, Callable[[], Any]] = {
            "/why": self.why,
            "/base": self.base,
            "/edit": lambda: self.edit(line),
            "/undo": self.undo,
            "/save": self.save,
            "/new": self.messages.clear,
            "/help": self.help,
        }
        if not word.startswith("/"):
            verbs[word] = lambda: self.say(line)
        if (verb := verbs.get(word)) is None:
            errors.print(f"there is no {word}; /help lists what there is", markup=False)
            return True
        try:
            with warnings.catch_warnings(record=True) as said:
                verb()
            for warning in said:
                errors.print(f"[yellow]{escape(str(warning.message))}[/]")
        except KeyboardInterrupt:
            console.print("\n(interrupted)", style="dim")
        except (OSError, ValueError, KeyError, RuntimeError, FloatingPointError) as error:
            print_error(error)
        return True

    def say(self, text: str) -> None:
        """The user says something, and the model answers, word by word."""
        asked = [*self.messages, {"role": "user", "content": text}]
        routing = self.editor.route(asked)
        said = self._answer(asked, routing)
        self.messages = [*asked, {"role": "assistant", "content": said}]
        self._routing = routing

    def _answer(self, asked: list[Message], routing: Routing | None = None) -> str:
        """What the model says next, shown word by word."""
        from transformers import TextStreamer

        console.print("model: ", end="", style="bold")
        streamer = TextStreamer(self.editor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self.editor.chat(asked, self.max_new_tokens, routing=routing, streamer=streamer)

    def _asked(self) -> list[Message]:
        """The conversation up to the user's last message."""
        if not self.messages:
            raise ValueError("nothing was asked yet")
        return self.messages[:-1]

    def why(self) -> None:
        """Which fact the last question was taken for, or each of several."""
        self._asked()
        assert self._routing is not None
        routing, _ = self._routing.each_question()
        assert routing.edits is not None
        threshold = routing.edits.gate.threshold
        for row, span in enumerate(routing.spans):
            fact = routing.edits.facts[int(routing.fact[row])]
            verdict = "taken for" if routing.accepted[row] else "not taken for"
            console.print(
                f"{span.text!r} was {verdict} {fact.query!r} -> {fact.answer!r}: the gate gives "
                f"{float(routing.score[row]):.3f}, and accepts above {threshold:.3f}",
                markup=False,
                highlight=False,
            )
            if not routing.named[row]:
                console.print(
                    f"it does not name {fact.subject!r}, the fact's subject", markup=False
                )
            if routing.left_to_base[row]:
                console.print("the fact was not learnt, so the base model answers for it")

    def base(self) -> None:
        """The base model's answer to the last question."""
        with self.editor.disabled():
            self._answer(self._asked())

    def edit(self, line: str) -> None:
        """Teach the model a fact; one with the same question is replaced."""
        try:
            _, query, answer = shlex.split(line)
        except ValueError:
            raise ValueError('type /edit "question" "answer", both in quotes') from None
        before = self.editor.edits
        with console.status("editing"):
            report = self.editor.add([Fact(query, answer)], replace=True)
        self._before.append((before, query))
        for fact in report.unlearnt:
            errors.print(f"[yellow]not learnt:[/] {escape(fact.query)}")
        console.print(f"edited in {sum(report.seconds.values()):.1f} s", highlight=False)

    def undo(self) -> None:
        """Take the last edit back."""
        if not self._before:
            raise ValueError("there is no /edit to take back")
        before, query = self._before.pop()
        self.editor.router.put(before)
        console.print(
            f"taken back: {query!r}; {len(self.editor.facts)} facts are edited. What was said "
            "stays in this conversation: /new begins another",
            markup=False,
            highlight=False,
        )

    def save(self) -> None:
        """Keep the edits in the folder."""
        self.editor.save_pretrained(self.folder)
        self._saved = self.editor.edits
        console.print(f"{len(self.editor.facts)} facts; saved to {self.folder}", markup=False)

    def help(self) -> None:
        """What else can be typed."""
        for command, what in COMMANDS.items():
            console.print(f"{command:6} {what}", markup=False, highlight=False)

    def _stays(self) -> bool:
        """Whether /quit must be typed again, because edits would be lost."""
        if self.editor.edits is self._saved or self._warned:
            return False
        self._warned = True
        errors.print("edits are not saved: /save keeps them, /quit again drops them")
        return True
