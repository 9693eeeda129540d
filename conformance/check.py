"""Whether a runtime's answers are the expected ones, and what is wrong there if they are not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.cases import (
    FAULTS,
    RIGHT,
    Answered,
    Batch,
    Case,
    Chat,
    Greedy,
    Logits,
    Message,
    Parse,
    Prompt,
    Render,
    Tokens,
)  # fmt: skip
from conformance.reference import NEW_TOKENS, Expected, Floats, faults_of
from conformance.runtime import TOLERANCES, NotApplicableError, Runtime
from ground.errors import first_line

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"
END = "<|im_end|>"
MOST_ANSWERED = 64  # tokens, more than an answer of the kit's has
# Weights that are rounded more than float16 may turn a near tie: so many of the tokens suffice.
COARSE, ENOUGH = TOLERANCES["f16"], 0.6
# An answer is that of a fault where it is nearer to it than this share of its distance to the right one.
NEAR = 0.3
OTHER_WEIGHTS = (
    "the output head is not the embedding matrix (tie_word_embeddings), or these are other weights"
)


@dataclass(frozen=True)
class Result:
    case: str
    outcome: str
    detail: str
    cause: str = ""

    def line(self) -> str:
        because = f"; likely cause: {self.cause}" if self.cause else ""
        return f"{self.outcome:14}  {self.case:16}  {self.detail}{because}"


@dataclass(frozen=True)
class Checker:
    """Holds a runtime, and its YaRN variant where there is one, against what is expected."""

    runtime: Runtime
    yarn: Runtime | None
    expected: Expected
    decode: Callable[[Sequence[int]], str]

    def results(self, cases: Sequence[Case]) -> Iterator[Result]:
        for case in cases:
            runtime = self.yarn if getattr(case, "yarn", False) else self.runtime
            if runtime is None:
                why = "no YaRN variant is beside MODEL; YARN= names it"
                yield Result(case.name, NOT_APPLICABLE, why)
                continue
            try:
                yield self._checked(case, runtime)
            except NotApplicableError as reason:
                yield Result(case.name, NOT_APPLICABLE, str(reason))
            except Exception as error:  # a runtime's own, whatever it is: the other cases go on
                yield Result(
                    case.name, FAILED, f"{type(error).__name__}: {first_line(error)[:200]}"
                )

    def _checked(self, case: Case, runtime: Runtime) -> Result:
        match case:
            case Logits():
                values = np.stack([runtime.logprobs(prompt) for prompt in case.prompts])
                return self._logits(case, values, runtime.tolerance)
            case Batch():
                return self._batch(case, runtime)
            case Greedy():
                return self._greedy(case, runtime)
            case Tokens():
                return _tokens(case, runtime)
            case Render():
                return self._render(case, runtime)
            case Parse():
                parts = runtime.parse(case.text, Chat([{"role": "user", "content": "Hi"}]))
                return _same_parts(case, parts)
            case Answered():
                return self._answered(case, runtime)

    def _logits(self, case: Logits, values: Floats, tolerance: float) -> Result:
        off = distance(values, self.expected.logprobs(case))
        shown = f"off by {off:.2g} of their spread, {tolerance:g} allowed"
        if off <= min(tolerance, COARSE):
            return Result(case.name, PASSED, f"{case.says}: {shown}")
        fault = self._fault(case, values, off, tolerance)
        if off <= tolerance and fault is None:
            return Result(case.name, PASSED, f"{case.says}: {shown}")
        if case.faults and fault is not None and fault not in case.faults:
            why = f"{case.says}: log-probabilities are wrong for another reason: {fault}"
            return Result(case.name, NOT_APPLICABLE, why)
        cause = FAULTS[fault] if fault else ""
        if fault is None and max(len(prompt.ids) for prompt in case.prompts) == 1:
            cause = OTHER_WEIGHTS
        elif fault is None and case.faults:
            why = f"{case.says}: log-probabilities are wrong, not by a fault of this case; see `logits`"
            return Result(case.name, NOT_APPLICABLE, why)
        return Result(case.name, FAILED, f"{case.says}: {shown}", cause)

    def _fault(self, case: Logits, values: Floats, off: float, tolerance: float) -> str | None:
        """The fault whose log-probabilities these are."""
        if max(len(prompt.ids) for prompt in case.prompts) == 1:
            return None  # where no position shows
        by = {
            fault: distance(values, self.expected.logprobs(case, fault))
            for fault in faults_of(case.yarn)
        }
        nearest = min(by, key=lambda fault: by[fault])
        is_near = by[nearest] < off and by[nearest] <= max(tolerance, NEAR * off)
        return nearest if is_near else None

    def _batch(self, case: Batch, runtime: Runtime) -> Result:
        off = distance(runtime.batch(case), self.expected.logprobs(case))
        shown = f"{case.says}: off by {off:.2g} of their spread, {runtime.tolerance:g} allowed"
        if off <= runtime.tolerance:
            return Result(case.name, PASSED, shown)
        cause = "the prompts see each other, or the padding, or their positions do not begin at 0"
        try:
            alone = np.stack([runtime.logprobs(prompt) for prompt in case.prompts])
        except NotApplicableError:
            return Result(case.name, FAILED, shown, cause)
        if distance(alone, self.expected.logprobs(case)) > runtime.tolerance:
            return Result(case.name, NOT_APPLICABLE, f"{case.says}: each alone is wrong already; see `logits`")  # fmt: skip
        return Result(case.name, FAILED, shown, cause)

    def _greedy(self, case: Greedy, runtime: Runtime) -> Result:
        found = [runtime.greedy(prompt, NEW_TOKENS) for prompt in case.prompts]
        equal = {
            fault: [self._equal_share(one, tokens) for one, tokens in zip(found, rows, strict=True)]
            for fault, rows in case.answers.items()
        }
        right = equal.pop(RIGHT)
        enough = ENOUGH if runtime.tolerance > COARSE else 1
        shown = f"{case.says}: {sum(share == 1 for share in right)} of {len(right)} equal"
        if sum(right) >= enough * len(right):
            return Result(case.name, PASSED, shown)
        if runtime.tolerance >= TOLERANCES["q8_0"]:
            raise NotApplicableError(f"{shown}; weights of 8 bits turn near ties")
        nearest = max(equal, key=lambda fault: sum(equal[fault]))
        is_near = sum(equal[nearest]) > max(sum(right), 0.8 * len(right))
        return Result(case.name, FAILED, shown, FAULTS[nearest] if is_near else "")

    def _equal_share(self, found: list[int] | str, tokens: list[int]) -> float:
        """How much of the expected tokens, or of their text, was written before the first other one."""
        wanted: list[int] | str = tokens
        if isinstance(found, str):
            found, wanted = found.removesuffix(END), self.decode(tokens).removesuffix(END)
        if found == wanted:
            return 1.0
        pairs = zip(found, wanted, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))  # fmt: skip
        return same / max(len(found), len(wanted), 1)

    def _render(self, case: Render, runtime: Runtime) -> Result:
        found = [runtime.render(chat) for chat in case.chats]
        wrong = [not _is_prompt(*pair) for pair in zip(found, case.prompts, strict=True)]
        counted = " (their number of tokens)" if isinstance(found[0], int) else ""
        shown = f"{case.says}: {wrong.count(False)} of {len(wrong)} prompts{counted} equal"
        if not any(wrong):
            return Result(case.name, PASSED, shown)
        place = wrong.index(True)
        one, prompt = found[place], case.prompts[place]
        if isinstance(one, int):
            return Result(case.name, FAILED, f"{shown}; {one} tokens for {len(prompt.ids)}", _template_cause(case, found))  # fmt: skip
        text = one if isinstance(one, str) else self.decode(one)
        return Result(case.name, FAILED, f"{shown}; {first_difference(text, prompt.text)}", _template_cause(case, found))  # fmt: skip

    def _answered(self, case: Answered, runtime: Runtime) -> Result:
        answer = runtime.answer(case.chat, MOST_ANSWERED)
        if isinstance(answer, Message):
            return _same_parts(case, answer)
        text = answer.removesuffix(END)
        if text == case.text:
            return Result(case.name, PASSED, f"{case.says}: its text is equal (nothing parses it)")
        return Result(case.name, FAILED, f"{case.says}: {first_difference(text, case.text)}", _unended(text, case.text))  # fmt: skip


def distance(found: Floats, wanted: Floats) -> float:
    """The largest difference of log-probabilities [prompts, vocabulary] that are said, as a share of
    their spread."""
    if np.isnan(found).all():
        raise NotApplicableError("the runtime gives no log-probabilities")
    return float(np.nanmax(np.abs(found - wanted)) / wanted.std(-1).mean())


def first_difference(found: str, wanted: str) -> str:
    pairs = enumerate(zip(found, wanted, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(found), len(wanted)))
    return f"at character {place} {found[place : place + 30]!r} for {wanted[place : place + 30]!r}"


def _is_prompt(found: str | list[int] | int, prompt: Prompt) -> bool:
    if isinstance(found, str):
        return found == prompt.text
    return found == (len(prompt.ids) if isinstance(found, int) else prompt.ids)


def _template_cause(case: Render, found: Sequence[object]) -> str:
    """Two chats that differ in their mode alone are rendered alike."""
    if case.name == "template-modes" and found[0] == found[1]:
        return "the template has no modes, or enable_thinking does not reach it"
    return "the runtime has another chat template, or does not give it its variables"


def _tokens(case: Tokens, runtime: Runtime) -> Result:
    found = [runtime.tokenize(prompt.text) for prompt in case.prompts]
    wrong = [one != prompt.ids for one, prompt in zip(found, case.prompts, strict=True)]
    shown = f"{case.says}: {wrong.count(False)} of {len(wrong)} equal"
    if not any(wrong):
        return Result(case.name, PASSED, shown)
    place = wrong.index(True)
    detail = f"{shown}; {case.prompts[place].text[:30]!r} differs"
    cause = "another pre-tokenizer (SmolLM3's split is Llama 3's) or another vocabulary"
    return Result(case.name, FAILED, detail, cause)


def _same_parts(case: Parse | Answered, found: Message) -> Result:
    if found == case.parts:
        return Result(case.name, PASSED, f"{case.says}: reasoning, content and calls are equal")
    pairs = ((key, getattr(found, key), getattr(case.parts, key)) for key in ("reasoning", "content", "calls"))  # fmt: skip
    detail = "; ".join(f"{key}: {str(a)[:60]!r} for {str(b)[:60]!r}" for key, a, b in pairs if a != b)  # fmt: skip
    tags = ("<think>", "<tool_call>")
    unparsed = found.content is not None and any(tag in found.content for tag in tags)
    cause = "no reasoning or tool parser is set there" if unparsed else ""
    return Result(case.name, FAILED, f"{case.says}: {detail}", cause)


def _unended(text: str, wanted: str) -> str:
    is_longer = text.startswith(wanted) and len(text) > len(wanted)
    return "generation does not end at <|im_end|>" if is_longer else ""
