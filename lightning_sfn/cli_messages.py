"""Turning the command line parser's reports into one sentence.

The parser reports a misspelt option of a callback as a dump of every type it tried, each with its own complaint. The
complaint that names the mistake is in there; the functions here find it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from difflib import get_close_matches

_KEY = re.compile(r'Parser key "([^"]+)":?')
_CLASS = re.compile(r"(?:given class_path '|class_path=')([\w.]+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)|No module named '([^']+)'|has no attribute '(\w+)'")
_NOT_A = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.+))?$", re.DOTALL)
_GIVEN = re.compile(r"\n\s*Given value: (.*)", re.DOTALL)
_DUMP = re.compile(r"\n\s*Given value type: .*", re.DOTALL)
_NOISE = re.compile(
    r"Does not validate against any of the Union|Subtypes: |Errors:$|Expected a <class 'NoneType'>|Not a valid subclass"
    r"|Subclass types expect|a class path \(str\)|a dict with|Expected a path but"
)
_BARE = re.compile(r"^\s*- Expected an? <class '\w+'>$", re.MULTILINE)
_LONGEST_VALUE = 60


def one_sentence(message: str) -> str:
    """Reduce a report of the command line parser to the mistake that it is about.

    Args:
        message: What the parser raised: one line, or a key followed by an indented list of complaints.

    Returns:
        One line: where, what was given, what was expected. A report of unknown form is returned in full, on one line.
    """
    report = _DUMP.sub("", message).strip()
    if not _KEY.match(report) and "Errors:" not in report:
        return _flat(report)
    where = ".".join(_KEY.findall(report))
    bare = _KEY.sub("", report)
    # That a class is no string says nothing where another complaint is about the class itself.
    complaint = _first_complaint(_BARE.sub("", bare)) or _first_complaint(bare) or report
    given = _GIVEN.search(message)
    sentence = _explain(complaint, given.group(1).strip() if given else "")
    return _flat(f"{where}: {sentence}" if where else sentence)


def _first_complaint(report: str) -> str:
    """Keep the first entry of the list of complaints that says something, with the lines indented below it."""
    kept: list[str] = []
    depth = 0
    for line in report.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        if kept and indent <= depth:
            break
        if text and not _NOISE.match(text):
            depth = depth if kept else indent
            kept.append(text)
    return " ".join(kept)


def _explain(complaint: str, given: str) -> str:
    if option := _OPTION.search(complaint):
        return _unknown_option(option.group(1), _class_blamed(complaint, option.start()))
    if unknown := _NO_CLASS.search(complaint):
        name = _class_blamed(complaint, unknown.start()) or next(filter(None, unknown.groups()))
        return f"there is no class {name!r}: check the spelling, or give the full import path of the class"
    if mismatch := _NOT_A.search(complaint):
        return f"{mismatch.group(1)!r} is not a {mismatch.group(2)}: name a class that is one"
    if expected := _EXPECTED.search(complaint):
        value = (expected.group(2) or given).strip()
        wanted = re.sub(r"<class '([^']+)'>", r"\1", expected.group(1)).replace("typing.Literal", "one of ")
        return f"expected {wanted}" + (f", got {value!r}" if value and len(value) <= _LONGEST_VALUE else "")
    return complaint


def _class_blamed(complaint: str, position: int) -> str:
    """Find the class that the complaint at a position is about: the value quoted right after it, or named before it."""
    after = _CLASS.search(complaint, position)
    before = _CLASS.findall(complaint[:position])
    return after.group(1) if after else before[-1] if before else ""


def _unknown_option(option: str, class_path: str) -> str:
    accepted = _options_of(class_path)
    name = class_path.rpartition(".")[2] or "this class"
    close = get_close_matches(option, accepted, n=1)
    if close:
        return f"{name} has no option {option!r}; did you mean {close[0]!r}?"
    return f"{name} has no option {option!r}" + (f"; its options are {', '.join(accepted)}" if accepted else "")


def _options_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
    skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [key for key, parameter in parameters.items() if key != "params" and parameter.kind not in skipped]


def _flat(text: str) -> str:
    return " ".join(text.split())
