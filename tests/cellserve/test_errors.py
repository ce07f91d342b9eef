"""The client's exceptions match the server's problems."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from cellserve import errors
from cellserve.service import errors as served


def kinds(kind: type[served.Problem]) -> Iterator[type[served.Problem]]:
    for one in kind.__subclasses__():
        yield one
        yield from kinds(one)


@pytest.mark.parametrize("kind", list(kinds(served.Problem)), ids=lambda kind: kind.__name__)
def test_every_problem_of_the_server_has_an_exception_class(kind: type[served.Problem]) -> None:
    answered = kind.__new__(kind)
    served.Problem.__init__(answered, "what was wrong", place="x")  # StaleSession has a detail of its own
    problem = errors.problem_of(json.loads(answered.document()), 3)
    by_status = errors._BY_STATUS.get(kind.status, errors.ServerProblem if kind.status >= 500 else errors.Problem)
    name = "".join(map(str.capitalize, kind.kind().split("-")))
    assert type(problem) is getattr(errors, name, by_status)
    assert (problem.status, problem.title, problem.detail) == (kind.status, kind.title, "what was wrong")
    assert (problem.extensions, problem.retry_after) == ({"place": "x"}, 3)


@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b'"text"', b'{"status": "x"}', b"\xff"])
def test_an_answer_without_a_problem_document_gets_the_class_of_its_status(body: bytes) -> None:
    assert isinstance(errors.problem_of_body(503, body), errors.ServerProblem)
    assert type(errors.problem_of_body(404, body)) is errors.NotFound
    assert type(errors.problem_of_body(418, body)) is errors.Problem
