"""Translates the mathematics of rules and ascents into C++: csrc/mathematics.h.

The header is checked in, so that building needs no more than a compiler; csrc/generate.py writes
it. It carries a digest of itself, which the library tells and the package compares: a library that
was built from other mathematics is not used.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator, Sequence

from ... import text as words
from ...ascents import KERNELS, SUMS, Ascent, Average, Sums
from ...blends import KERNELS as BLENDS
from ...blends import Blend
from ...rules import RULES, Rule
from ...text import Text

MAX_STATES = 3
"""States that the operation ``update_`` takes."""

TABLES = 9
"""Goes up with every change of the operations' arguments or of the tables that they read."""

_OPERATORS: dict[type[ast.AST], str] = {
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"},
    **{ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="},
    **{ast.BitAnd: "&&", ast.BitOr: "||"},
}

_WORDS = {name for name, word in inspect.getmembers(words, inspect.isfunction)}

_TEXTS: tuple[Text, ...] = (words.is_finite, words.clip, words.lerp)
"""Words that are texts themselves."""


class _Translator:
    """One text as C++ statements.

    Args:
        text: the function.
        absent: for each argument that may be None, the C++ condition that it is there.

    Raises:
        SyntaxError: the text holds something that it may not; the message says what.
    """

    def __init__(self, text: Text, absent: dict[str, str]) -> None:
        source = textwrap.dedent(inspect.getsource(text))
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        self.arguments = [argument.arg for argument in function.args.args]
        *self._body, end = function.body
        if not isinstance(end, ast.Return) or end.value is None:
            raise SyntaxError(f"a text must end with a return, not with: {ast.unparse(end)}")
        self._returned = end.value
        self._absent = absent

    def statements(self) -> list[str]:
        """The body, but for its return."""
        return list(self._block(self._body, set(self.arguments)))

    @property
    def results(self) -> list[str]:
        """The expressions that are returned."""
        value = self._returned
        return [
            self._expression(e) for e in (value.elts if isinstance(value, ast.Tuple) else [value])
        ]

    def _block(self, body: Sequence[ast.stmt], known: set[str]) -> Iterator[str]:
        for statement in body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    declared = name if name in known else f"auto {name}"
                    known.add(name)
                    yield f"{declared} = {self._expression(value)};"
                case ast.If(
                    test=ast.Compare(
                        left=ast.Name(id=name),
                        ops=[ast.IsNot()],
                        comparators=[ast.Constant(value=None)],
                    ),
                    orelse=[],
                ) if name in self._absent:
                    yield f"if constexpr ({self._absent[name]}) {{"
                    yield from [f"  {line}" for line in self._block(statement.body, set(known))]
                    yield "}"
                case ast.Expr(value=ast.Constant()):
                    pass  # a docstring
                case _:
                    raise SyntaxError(f"a text cannot hold: {ast.unparse(statement)}")

    def _expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return name
            case ast.Constant(value=(int() | float()) as value) if not isinstance(value, bool):
                return f"T({value})"
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self._expression(operand)})"
            case (
                ast.BinOp(left=left, op=operator, right=right)
                | ast.Compare(left=left, ops=[operator], comparators=[right])
            ) if sign := _OPERATORS.get(type(operator)):
                return f"({self._expression(left)} {sign} {self._expression(right)})"
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _WORDS:
                return f"words::{name}({', '.join(map(self._expression, arguments))})"
        raise SyntaxError(f"a text cannot hold: {ast.unparse(node)}")


def _fields(names: Sequence[str]) -> str:
    return " ".join(f"T {name};" for name in names)


def _unpack(names: Sequence[str], source: str) -> list[str]:
    return [f"[[maybe_unused]] T {name} = {source}.{name};" for name in names]


def _struct(name: str, comment: str, lines: Sequence[str]) -> str:
    body = "\n".join(f"  {line}" if line else "" for line in lines)
    return f"// {comment}\nstruct {name} {{\n{body}\n}};\n"


def _function(head: str, lines: Sequence[str]) -> list[str]:
    return [f"{head} {{", *[f"  {line}" for line in lines], "}"]


def _helper(text: Text) -> str:
    translated = _Translator(text, {})
    (result,) = translated.results
    arguments = ", ".join(f"T {name}" for name in translated.arguments)
    head = f"template <typename T>\nFUSED_SAM_INLINE auto {text.__name__}({arguments})"
    return "\n".join(_function(head, [*translated.statements(), f"return {result};"])) + "\n"


def _numbers(names: Sequence[str]) -> list[str]:
    return [f"[[maybe_unused]] T {name} = T(numbers_[{i}]);" for i, name in enumerate(names)]


def _scalars_function(
    text: Text, columns: Sequence[str], rest: str, numbers: Sequence[str] = ()
) -> list[str]:
    translated = _Translator(text, {})
    results = ", ".join(translated.results)
    return _function(
        f"template <typename T>\nstatic FUSED_SAM_INLINE Scalars<T> scalars("
        f"const Columns<T>& columns_, [[maybe_unused]] {rest})",
        [
            *_numbers(numbers),
            *_unpack(columns, "columns_"),
            *translated.statements(),
            f"return {{{results}}};",
        ],
    )


def _rule(rule: Rule) -> str:
    columns = ("lr", *rule.column_names)
    names = [state.name for state in rule.states]
    kept = {name: f"kKept & {1 << i}u" for i, name in enumerate(names)}
    update = _Translator(rule.update, kept)
    fields = update.arguments[2 + len(names) :]
    param, *states = update.results
    momentum = -1 if rule.momentum is None else names.index(rule.momentum)
    always = sum(1 << i for i, state in enumerate(rule.states) if state.kept is None)
    stores = [f"state_[{i}] = {value};" for i, value in enumerate(states)]
    return _struct(
        rule.name,
        f"states: {', '.join(names)}",
        [
            f"static constexpr int kColumns = {len(columns)};",
            f"static constexpr int kStates = {len(names)};",
            f"static constexpr unsigned kAlways = {always};  // states that every group keeps",
            f"static constexpr bool kCounts = {str(rule.counts).lower()};",
            f"static constexpr int kMomentum = {momentum};  // which state it is; negative: none",
            f"template <typename T>\n  struct Columns {{ {_fields(columns)} }};",
            f"template <typename T>\n  struct Scalars {{ {_fields(fields)} }};",
            "",
            *_scalars_function(rule.scalars, columns, "T step, [[maybe_unused]] bool fresh"),
            "",
            *_function(
                "template <unsigned kKept, typename T>\nstatic FUSED_SAM_INLINE T update("
                "T param, T grad, T (&state_)[kMaxStates], const Scalars<T>& scalars_)",
                [
                    *[f"T {name} = state_[{i}];" for i, name in enumerate(names)],
                    *_unpack(fields, "scalars_"),
                    *update.statements(),
                    *stores,
                    f"return {param};",
                ],
            ),
        ],
    )


def _average(average: Average) -> str:
    follow, columns = _Translator(average.follow, {}), average.column_names
    grad, kept = follow.arguments[:2]
    direction, new = follow.results
    return _struct(
        average.name,
        "a running average of the gradients, and the directions that are made of it",
        [
            "static constexpr bool kIs = true;",
            "",
            *_function(
                "template <typename T, typename Group>\nstatic FUSED_SAM_INLINE void follow("
                f"T {grad}, T {kept}, const Group& columns_, T& direction_, T& new_)",
                [
                    *_unpack(columns, "columns_"),
                    *follow.statements(),
                    f"direction_ = {direction};",
                    f"new_ = {new};",
                ],
            ),
        ],
    )


def _sums(sums: Sums) -> str:
    other = next(iter(inspect.signature(sums.terms).parameters))
    terms = _Translator(sums.terms, {other: "kReads"})
    earlier, columns = terms.arguments[2 : 2 + sums.earlier], sums.column_names
    average = sums.average.column_names if sums.average else ()
    results = [f"terms_[{i}] = {value};" for i, value in enumerate(terms.results)]
    given = ["[[maybe_unused]] const Columns<T>& columns_"]
    given += ["[[maybe_unused]] const Earlier<T>& earlier_"]
    return _struct(
        sums.name,
        "summed over all elements" if sums.how == "sum" else "the largest of all elements",
        [
            f"using Average = {sums.average.name if sums.average else 'NoAverage'};",
            f"static constexpr int kColumns = {len(columns) + len(average)};",
            f"static constexpr int kEarlier = {len(earlier)};  // numbers that were reduced before",
            f"static constexpr int kCount = {sums.count};",
            f"static constexpr bool kMax = {str(sums.how == 'max').lower()};",
            f"static constexpr bool kReadsKept = {str(sums.reads_kept).lower()};",
            f"static constexpr bool kWide = {str(sums.wide).lower()};  // all of it in float64",
            f"template <typename T>\n  struct Columns {{ {_fields((*columns, *average))} }};",
            f"template <typename T>\n  struct Earlier {{ {_fields(earlier)} }};",
            "",
            *_function(
                "template <typename T>\nstatic FUSED_SAM_INLINE Earlier<T> earlier("
                "[[maybe_unused]] const double* numbers_)",
                [f"return {{{', '.join(f'T(numbers_[{i}])' for i in range(len(earlier)))}}};"],
            ),
            "",
            *_function(
                "template <bool kReads, typename T>\nstatic FUSED_SAM_INLINE void terms("
                f"[[maybe_unused]] T {other}, T grad, {', '.join(given)}, T (&terms_)[kCount])",
                [
                    *_unpack(earlier, "earlier_"),
                    *_unpack(columns, "columns_"),
                    *terms.statements(),
                    *results,
                ],
            ),
        ],
    )


def _blend(blend: Blend) -> str:
    coefficients = _Translator(blend.coefficients, {})
    *numbers, scale = coefficients.arguments[: blend.count + 1]
    columns, results = blend.column_names, ", ".join(coefficients.results)
    return _struct(
        blend.name,
        "v = a * g' + b * d, d a direction" if blend.reuses else "v = a * g' + b * g",
        [
            f"static constexpr int kColumns = {len(columns)};",
            f"static constexpr int kNumbers = {len(numbers)};",
            f"static constexpr bool kAfter = {str(blend.after).lower()};  // w -= lr (c g' + d g)",
            f"static constexpr bool kDirects = {str(blend.reuse is not None).lower()};  // keeps v",
            f"template <typename T>\n  struct Columns {{ {_fields(columns)} }};",
            "",
            *_function(
                "template <typename Group>\nstatic FUSED_SAM_INLINE Coefficients coefficients("
                f"[[maybe_unused]] const Group& columns_, const double* numbers_, "
                f"[[maybe_unused]] double {scale})",
                [
                    "using T = double;",
                    *_numbers(numbers),
                    *_unpack(columns, "columns_"),
                    *coefficients.statements(),
                    f"return {{{results}}};",
                ],
            ),
        ],
    )


def _ascent(ascent: Ascent) -> str:
    scalars = _Translator(ascent.scalars, {})
    move = _Translator(ascent.move, {})
    fields = move.arguments[2:]
    (result,) = move.results
    numbers = scalars.arguments[: len(ascent.sums.chain)]
    columns = scalars.arguments[len(numbers) :]
    return _struct(
        ascent.name,
        f"climbs by the numbers of {ascent.sums.name}",
        [
            f"using Average = {ascent.sums.name}::Average;",
            f"static constexpr int kColumns = {ascent.sums.name}::kColumns;",
            f"static constexpr int kNumbers = {len(numbers)};  // reduced before it climbs",
            f"template <typename T>\n  using Columns = {ascent.sums.name}::Columns<T>;",
            f"template <typename T>\n  struct Scalars {{ {_fields(fields)} }};",
            "",
            *_scalars_function(ascent.scalars, columns, "const double* numbers_", numbers),
            "",
            *_function(
                "template <typename T>\nstatic FUSED_SAM_INLINE T move("
                "T param, T grad, const Scalars<T>& scalars_)",
                [*_unpack(fields, "scalars_"), *move.statements(), f"return {result};"],
            ),
        ],
    )


_HEAD = """\
// Generated by csrc/generate.py from the texts in fused_sam/rules/, ascents/ and blends/. Do not
// edit: change the texts, and generate it again.
#pragma once

#include "words.h"

namespace fused_sam {
inline namespace FUSED_SAM_ISA {
"""

_FOOT = """\
}  // namespace FUSED_SAM_ISA
"""


def _list(name: str, entries: Sequence[str]) -> str:
    return f"#define {name}(_) {' '.join(f'_({entry})' for entry in entries)}\n"


def rules() -> list[Rule]:
    """The rules that have mathematics of their own, in the order of their numbers."""
    return list({rule.name: rule for rule in RULES.values()}.values())


@functools.cache
def header() -> str:
    """The text of csrc/mathematics.h, before clang-format."""
    parts = [
        _HEAD,
        f"constexpr int kMaxStates = {MAX_STATES};\n",
        "namespace words {\n",
        *map(_helper, _TEXTS),
        "}  // namespace words\n",
        *map(_rule, rules()),
        "struct NoAverage {\n  static constexpr bool kIs = false;\n};\n",
        *[_average(ascent.average) for ascent in KERNELS if ascent.average],
        *map(_sums, SUMS),
        *map(_ascent, KERNELS),
        "struct Coefficients {\n  double a, b, c = 0, d = 0;\n};\n",
        *map(_blend, BLENDS),
        _FOOT,
        f"constexpr int kNumRules = {len(rules())};",
        f"constexpr int kNumSums = {len(SUMS)};",
        f"constexpr int kNumAscents = {len(KERNELS)};",
        f"constexpr int kNumBlends = {len(BLENDS)};\n",
        "}  // namespace fused_sam\n",
        _list("FUSED_SAM_RULES", [rule.name for rule in rules()]),
        _list("FUSED_SAM_SUMS", [sums.name for sums in SUMS]),
        _list("FUSED_SAM_ASCENTS", [ascent.name for ascent in KERNELS]),
        _list("FUSED_SAM_BLENDS", [blend.name for blend in BLENDS]),
    ]
    return "\n".join(parts)


@functools.cache
def digest() -> str:
    """16 hexadecimal digits that change with the mathematics, and with the tables' layout."""
    return hashlib.sha256(f"{TABLES} {header()}".encode()).hexdigest()[:16]


def stamped_header() -> str:
    """The header with its digest."""
    return f'{header()}\n#define FUSED_SAM_MATHEMATICS "{digest()}"\n'
