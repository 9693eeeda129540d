"""Two tools that `make chat` offers a model, and calls: arithmetic, and Python in the sandbox."""

import ast
import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eval_tasks.sandbox.outside import run_tests
from ground.errors import UserError, first_line
from ground.tool_calls import PYTHON, ToolCall

DIGITS = 300  # of a number, at most: 9**9**9 would fill the memory
RESULT_CHARACTERS = 2000
CALCULATE = "calculate"
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def _described(name: str, description: str, parameter: str, what: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string", "description": what}}
    schema = {"type": "object", "properties": properties, "required": [parameter]}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


# As a server's clients list them, and as code calls them: `tools` and `python_tools` of the template.
AS_JSON = (
    _described(CALCULATE, "Work out an arithmetic expression.", "expression", "such as (2 + 3) * 4"),
    _described(PYTHON, "Run Python code; returns what it prints.", "code", "the program"),
)  # fmt: skip
AS_CODE = ("def calculate(expression: str) -> str",)
SIGNATURES = {CALCULATE: ("expression",), PYTHON: ("code",)}
_IN_CODE = "def calculate(expression):\n    return eval(expression, {'__builtins__': {}})\n"


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and brackets. Raises ValueError."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(operand))
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _applied(type(op), value(left), value(right))
        raise ValueError("numbers, + - * / // % ** and brackets are what it knows")

    return str(value(ast.parse(expression.strip(), mode="eval")))


def _applied(kind: type, left: Any, right: Any) -> Any:
    if kind is ast.Pow and abs(right) * math.log10(abs(left) or 1) > DIGITS:
        raise ValueError(f"more than {DIGITS} digits")
    result = _OPERATORS[kind](left, right)
    if isinstance(result, complex) or abs(result) > 10**DIGITS:
        raise ValueError(f"no real number of at most {DIGITS} digits")
    return result


@dataclass
class Session:
    """Carries calls out; Python keeps its variables from one call to the next."""

    programs: list[str] = field(default_factory=list)

    def result(self, call: ToolCall) -> str:
        """What a call gives, or what was wrong with it: the model reads both."""
        try:
            match call:
                case ToolCall(name="calculate", arguments={"expression": str() as expression}):
                    text = calculate(expression)
                case ToolCall(name="python", arguments={"code": str() as code}):
                    text = self._run(code)
                case ToolCall(name="calculate" | "python" as name):
                    (wanted,) = SIGNATURES[name]
                    text = f"error: {name} takes one argument, the string {wanted}"
                case _:
                    text = (
                        f"error: no tool {json.dumps(call.name)}; there are {', '.join(SIGNATURES)}"
                    )
        except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError) as error:
            text = f"error: {first_line(error)}"
        return text[:RESULT_CHARACTERS]

    def _run(self, code: str) -> str:
        """What the code prints; the programs before it run again, unheard: each is a new process."""
        before = "\n".join(self.programs)
        quiet = f"import contextlib as _c, io as _i\n{_IN_CODE}with _c.redirect_stdout(_i.StringIO()):\n    exec({before!r}, globals())\n"
        try:
            done = run_tests(f"{quiet}exec({code!r}, globals())")
        except UserError as error:  # no sandbox here: code is refused, never run without
            return f"error: {error}"
        if not done.passed:
            return f"error: {done.reason}"
        self.programs.append(code)
        return done.printed.rstrip() or "(nothing was printed)"
