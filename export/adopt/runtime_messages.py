"""What ONNX Runtime says when it cannot open or run a graph, in one line and without its own source files."""

from __future__ import annotations

import re

_LONGEST = 400  # letters; a message that quotes a large shape or graph is cut
# The file and line of a check, the function, and the condition: `x.h:9 void f(int) a == b was false. `.
_SOURCE = re.compile(
    r"[\w./\\-]+\.(?:cc|cpp|cu|h|hpp):\d+ (?:[^()]*::[^()]*\([^)]*\)(?: const)?(?: \[with [^\]]*\])?|\w+)"
    r"(?: (?:(?!\. ).)+ was (?:false|true)\.)? ?"
)
_HEADINGS = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |\[\w+Error\] |This is an invalid model\. |"
    r"Please fix either the inputs/outputs or the model\.| for the following indices"
)
_RUNNING = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: ")
_IN_NODE = re.compile(r'In Node, \("(.*?)", (\w+), .*?\) : .* , Error (?:Node \(.*?\) ?)?(.*)')


def reason(text: str) -> str:
    """The reason in a message of ONNX Runtime, with the operator if it names one."""
    line = _SOURCE.sub("", _HEADINGS.sub("", " ".join(text.split())))
    if running := _RUNNING.search(line):
        line = f"{_node(running[1], running[2])}: {line[running.end() :] or 'no reason given'}"
    elif told := _IN_NODE.fullmatch(line):
        line = f"{_node(told[2], told[1])}: {told[3]}"
    line = line.strip().rstrip(".:") or "no reason given"
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _node(operator: str, name: str) -> str:
    return f"{operator} node {name!r}" if name else f"{operator} node"
