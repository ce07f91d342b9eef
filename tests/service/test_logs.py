"""The log: what belongs to a message is in its line, whatever the form."""

from __future__ import annotations

import json
import logging

import pytest

from cellserve.service.api.asgi import as_problem
from cellserve.service.observability.counters import SurfaceCounts
from cellserve.service.observability.logging import formatter
from cellserve.service.observability.request_context import RequestContext, make_scope, problem_body
from cellserve.service.settings import LogFormat


def line(form: LogFormat, caplog: pytest.LogCaptureFixture) -> str:
    return formatter(form).format(caplog.records[-1])


def test_an_error_nobody_expected_is_logged_with_the_request_s_id(caplog: pytest.LogCaptureFixture) -> None:
    scope = make_scope(RequestContext("mine", SurfaceCounts()), method="POST", path="/predict")
    try:
        raise ZeroDivisionError("of ours")
    except ZeroDivisionError as error:
        problem = as_problem(error, scope)
    document = json.loads(problem_body(problem, scope))
    assert (document["status"], document["request_id"]) == (500, "mine")
    assert "of ours" not in str(document)
    written = json.loads(line("json", caplog))
    assert (written["level"], written["message"], written["request_id"]) == ("error", "POST /predict failed", "mine")
    assert "ZeroDivisionError: of ours" in written["exception"]
    assert line("text", caplog).startswith("ERROR: POST /predict failed request_id=mine\nTraceback")


def test_a_message_is_one_line_and_steers_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("cellserve").warning(
        "refused: %s", "\x1b[31m\r\nINFO: mine\u2028\x9b1m\N{RIGHT-TO-LEFT OVERRIDE}é"
    )
    told = line("text", caplog)
    assert told == r"WARNING: refused: \x1b[31m\r\nINFO: mine\u2028\x9b1m\u202eé"
    assert "\n" not in line("json", caplog)


def test_a_line_without_a_request_has_none(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("cellserve").warning("%d sessions", 3)
    assert line("text", caplog) == "WARNING: 3 sessions"
    assert json.loads(line("json", caplog)).keys() == {"time", "level", "logger", "message"}
