"""The prompts of LLM judges, and how their verdicts are read.

A prompt is a text file with a part under `[system]` (may be left out) and one under `[user]`. In them stand {instruction},
{output_1} and {output_2} for a judge of pairs, {instruction} and {output} for one of single replies, with {min_score} and
{max_score} if it likes. It must ask for a last line that is exactly the verdict: `VERDICT: 1`, `VERDICT: 2` or `VERDICT: TIE`;
`SCORE: 7`. A judge with `structured_output` is told the JSON's form behind that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.config.endpoints import is_built_in
from rlhf_ray.config.hints import did_you_mean
from rlhf_ray.config.yaml_reader import read_text
from rlhf_ray.errors import ConfigError

FOLDER = Path(__file__).parent / "prompts"
_PARTS = re.compile(r"^\[(system|user)\][ \t]*\n", re.MULTILINE)
_FIELD = re.compile(r"\{(instruction|output|output_1|output_2|min_score|max_score)\}")
_NEEDED = {"pairwise": ("instruction", "output_1", "output_2"), "pointwise": ("instruction", "output")}
_MARK = {"pairwise": "VERDICT:", "pointwise": "SCORE:"}
_VERDICT = re.compile(r"VERDICT: ?(1|2|TIE)\.?")
_SCORE = re.compile(r"SCORE: ?(-?\d{1,6})\.?")
DRAW, FIRST, SECOND = 0, 1, 2
_VERDICTS = {"1": FIRST, "2": SECOND, "TIE": DRAW}
_AGAIN = {
    "pairwise": "Answer with one line and nothing else: VERDICT: 1, or VERDICT: 2, or VERDICT: TIE.",
    "pointwise": "Answer with one line and nothing else, which holds the number: SCORE: and a whole number.",
}
_JSON = {
    "pairwise": 'Answer with JSON and nothing else: {"verdict": "1"}, or {"verdict": "2"}, or {"verdict": "TIE"}.',
    "pointwise": 'Answer with JSON and nothing else, which holds the number: {"score": a whole number}.',
}


@dataclass(frozen=True)
class JudgePrompt:
    """name: of the prompt.  system, user: its parts, with fields in braces."""

    name: str
    system: str
    user: str

    def messages(self, **values: str | int) -> list[dict[str, str]]:
        """The conversation that asks a judge. A value is put in as it is, whatever braces it holds."""

        def fill(text: str) -> str:
            return _FIELD.sub(lambda found: str(values.get(found[1], found[0])), text)

        system = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.user)}]


@dataclass(frozen=True)
class VerdictForm:
    """How a verdict is asked for and read.

    read: a judge's answer -> a verdict or score, None if it holds none.  again: what a judge is told whose answer holds none.
    behind: added to the question.  response_format: as OpenAI's API takes it, None for free text."""

    read: Callable[[str], int | None]
    again: str
    behind: str = ""
    response_format: dict[str, Any] | None = None


def verdict_form(mode: Literal["pairwise", "pointwise"], structured: bool, low: int, high: int) -> VerdictForm:
    """structured: JSON by a schema, else a last line.  low, high: of a score."""
    if not structured:
        return VerdictForm(
            read_verdict if mode == "pairwise" else lambda text: read_score(text, low, high), _AGAIN[mode]
        )
    name = "verdict" if mode == "pairwise" else "score"
    allowed = (
        {"type": "string", "enum": list(_VERDICTS)}
        if mode == "pairwise"
        else {"type": "integer", "minimum": low, "maximum": high}
    )
    schema = {"type": "object", "properties": {name: allowed}, "required": [name], "additionalProperties": False}
    told = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}

    def read(text: str) -> int | None:
        try:
            value = json.loads(text)[name]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if mode == "pairwise":
            return _VERDICTS.get(value) if isinstance(value, str) else None
        return value if type(value) is int and low <= value <= high else None

    return VerdictForm(read, _JSON[mode], f"\n\n{_JSON[mode]}", told)


def load_prompt(spec: str | None, mode: Literal["pairwise", "pointwise"], where: str) -> JudgePrompt:
    """The prompt of that name in the package, or the file; None: the one that is called as `mode`.

    Raises ConfigError: no such prompt, a field is missing, or it does not ask for a verdict."""
    name = spec or mode
    path = FOLDER / f"{name}.txt" if is_built_in(name) else Path(name).expanduser()
    if is_built_in(name) and not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.txt"))
        raise ConfigError.at(where, "no prompt of this name", ", ".join(known), name, did_you_mean(name, known))
    text = read_text(path, "judge's prompt")
    pieces = _PARTS.split(text)
    parts = dict(zip(pieces[1::2], (piece.strip() for piece in pieces[2::2])))
    if not parts.get("user") or pieces[0].strip():
        raise ConfigError.at(where, f"{path} has no part under [user], or text before its parts", "[system] and [user]")
    both = parts.get("system", "") + parts["user"]
    for field in _NEEDED[mode]:
        if f"{{{field}}}" not in both:
            raise ConfigError.at(
                where, f"{path} lacks {{{field}}}", f"all of {', '.join(_NEEDED[mode])} for mode {mode}"
            )
    if _MARK[mode] not in both:
        raise ConfigError.at(where, f"{path} does not ask for a verdict", f"a last line {_MARK[mode]} ...")
    return JudgePrompt(name, parts.get("system", ""), parts["user"])


def read_verdict(text: str) -> int | None:
    """FIRST, SECOND or DRAW, from the last line of a judge's answer; None if that line is anything but a verdict, or if
    another line holds a different one.

    >>> read_verdict("Both are fine.\\nVERDICT: TIE"), read_verdict("VERDICT: 1, I think"), read_verdict("VERDICT: 1\\nVERDICT: 2")
    (0, None, None)
    """
    found = _last_line(text, _VERDICT)
    return None if found is None else _VERDICTS[found]


def read_score(text: str, low: int, high: int) -> int | None:
    """The number of the last line `SCORE: n`; None if that line is anything else, or n is outside of low..high.

    >>> read_score("SCORE: 7", 1, 10), read_score("7/10", 1, 10), read_score("SCORE: 11", 1, 10)
    (7, None, None)
    """
    found = _last_line(text, _SCORE)
    return int(found) if found is not None and low <= int(found) <= high else None


def _last_line(text: str, form: re.Pattern[str]) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    verdicts = [match[1] for line in lines if (match := form.fullmatch(line))]
    if not lines or not form.fullmatch(lines[-1]) or len(set(verdicts)) != 1:
        return None
    return verdicts[0]
