"""The texts of rules and ascents as C++: what they become, and what is refused."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_sam.ascents import ASCENTS
from fused_sam.backends.native import translate
from fused_sam.text import maximum, where

HEADER = Path(__file__).parent.parent / "csrc" / "mathematics.h"
CLANG_FORMAT = shutil.which("clang-format", path=Path(sys.executable).parent) or shutil.which(
    "clang-format"
)


@pytest.mark.skipif(not HEADER.exists(), reason="csrc/ is not here")
@pytest.mark.skipif(CLANG_FORMAT is None, reason="clang-format is not here: install it")
def test_the_checked_in_header_is_what_the_texts_give():
    """Guards a rule that is changed in Python alone: C++ would go on with the old mathematics."""
    formatted = subprocess.run(
        [CLANG_FORMAT, "--assume-filename", str(HEADER)],
        input=translate.stamped_header(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert formatted.stdout == HEADER.read_text(), "run: python csrc/generate.py"


def plain(param, grad, kept, scale):
    """A docstring is none of it."""
    grad = where(scale < 0.5, -grad, 2 * grad)
    if kept is not None:
        kept = maximum(kept, grad)
        grad = kept
    return param - scale * grad, kept


def test_a_text_becomes_statements_and_results():
    translated = translate._Translator(plain, {"kept": "kKept & 1u"})
    assert translated.arguments == ["param", "grad", "kept", "scale"]
    assert translated.statements() == [
        "grad = words::where((scale < T(0.5)), (-grad), (T(2) * grad));",
        "if constexpr (kKept & 1u) {",
        "  kept = words::maximum(kept, grad);",
        "  grad = kept;",
        "}",
    ]
    assert translated.results == ["(param - (scale * grad))", "kept"]


def loop(param, grad):
    for _ in range(2):
        grad = grad * param
    return grad


def in_place(param, grad):
    grad += param
    return grad


def power(param, grad):
    return grad**2


def chained(param, grad):
    return where(0 < grad < 1, grad, param)


def python_branch(param, grad):
    if grad > 0:
        grad = param
    return grad


def otherwise(param, grad):
    if param is not None:  # noqa: SIM108
        grad = param
    else:
        grad = -grad
    return grad


def is_other(param, grad):
    if param is not grad:
        grad = param
    return grad


def never_absent(param, grad):
    if grad is not None:
        grad = param
    return grad


def two_returns(param, grad):
    if param is not None:
        return param
    return grad


def by_keyword(param, grad):
    return where(grad > 0, y=param, x=grad)


def other_function(param, grad):
    return max(param, grad)


def no_word(param, grad):
    return Tensor(grad)  # noqa: F821


def method(param, grad):
    return grad.abs()


def flag(param, grad):
    return where(True, param, grad)


@pytest.mark.parametrize(
    "text, construct",
    [
        (loop, "for _ in range(2):"),
        (in_place, "grad += param"),
        (power, "grad ** 2"),
        (chained, "0 < grad < 1"),
        (python_branch, "if grad > 0:"),
        (otherwise, "if param is not None:"),
        (is_other, "if param is not grad:"),
        (never_absent, "if grad is not None:"),
        (two_returns, "return param"),
        (by_keyword, "where(grad > 0, y=param, x=grad)"),
        (other_function, "max(param, grad)"),
        (no_word, "Tensor(grad)"),
        (method, "grad.abs()"),
        (flag, "True"),
    ],
)
def test_what_a_text_cannot_hold_is_refused_by_name(text, construct):
    """Guards what C++ would take in another sense, as a return or a keyword that is left out."""
    with pytest.raises(SyntaxError) as error:
        translated = translate._Translator(text, {"param": "kReadsParam"})
        assert not (translated.statements(), translated.results)
    assert str(error.value).startswith(f"a text cannot hold: {construct}")


def no_return(param, grad):
    grad = grad * param


def test_a_text_without_a_return_is_refused():
    with pytest.raises(SyntaxError, match=r"must end with a return, not with: grad = grad \* par"):
        translate._Translator(no_return, {})


@pytest.fixture
def uncached():
    """header() and digest() anew, before and afterwards."""
    translate.header.cache_clear()
    translate.digest.cache_clear()
    yield
    translate.header.cache_clear()
    translate.digest.cache_clear()


def downhill(param, grad, scale, adaptive, eta):
    return param - scale * grad


@pytest.mark.parametrize(
    "name, value",
    [
        ("KERNELS", (dataclasses.replace(ASCENTS["sam"], move=downhill),)),
        ("RULES", {}),
        ("TABLES", translate.TABLES + 1),
    ],
)
def test_the_digest_changes_with_the_texts_and_the_tables(uncached, monkeypatch, name, value):
    """Guards a library that was built from other mathematics, or reads tables of another layout."""
    before = translate.digest()
    assert f'"{before}"' in translate.stamped_header()
    translate.header.cache_clear()
    translate.digest.cache_clear()
    monkeypatch.setattr(translate, name, value)
    assert translate.digest() != before
