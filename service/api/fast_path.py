"""The fast path: single steps, and predictions of one sequence, over HTTP without an ASGI task or ASGI messages.

A request that is not of the simple form, or that anything is wrong with, is left to the ASGI endpoint of its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import orjson
from numpy.typing import NDArray

from cellserve.service.access.peer_address import Address
from cellserve.service.api import safetensors
from cellserve.service.api.answer_size import LARGE
from cellserve.service.api.asgi import JSON, REPLAY, as_problem
from cellserve.service.api.browser_rules import BrowserRules
from cellserve.service.api.client_identity import TrustedProxies, address_identity
from cellserve.service.api.predict_codec import parse_prediction, prediction_json, wants_every_output
from cellserve.service.api.step_codec import NOT_SIMPLE, parse_simple_step, step_json
from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.engine.pending import Pending
from cellserve.service.engine.pending_sequence import SequenceResult, start_sequence
from cellserve.service.engine.sequence_runner import name_sequence
from cellserve.service.errors import NotFinite, Problem
from cellserve.service.model_repository.model import Model
from cellserve.service.observability.counters import SurfaceCounts
from cellserve.service.observability.request_context import HEADER, RequestContext, make_scope, new_id, problem_body
from cellserve.service.sessions.pending_steps import PendingStep, StepResult
from cellserve.service.sessions.session import Session
from cellserve.service.validation.decoding import ADMITTED_BYTES
from cellserve.service.validation.json_bodies import LEFT_OUT, PredictRequest

Headers = Iterable[tuple[bytes, bytes]]

_BEGIN, _END = b"/sessions/", b"/step"
_PREDICT = b"/predict"
_SAFETENSORS = (b"content-type", safetensors.MEDIA_TYPES[0])


class Connection(Protocol):
    """What carries the answers."""

    client: Address  # of the request

    def respond(self, exchange: Exchange, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Sends an answer; without headers it is JSON. Nothing happens where the client has disconnected."""


class Route(NamedTuple):
    """What the fast path does with the requests of one endpoint."""

    start: Callable[[Exchange], bool]  # starts a request; False where it is one for the ASGI endpoint
    surface: SurfaceCounts
    path: str  # logged for a failed request
    admitted_bytes: int  # larger bodies take long enough to read that they have to be admitted first


class Exchange:
    """One request and its answer, with the attributes that uvicorn reads of its own request-response cycles.

    Args:
        connection: Carries the answer.
        route: Its endpoint's.
        url: The request's target.
        headers: Its headers, with their names in lower case.
    """

    def __init__(self, connection: Connection, route: Route, url: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.connection, self.route, self.url, self.headers = connection, route, url, headers
        self.body = b""
        self.is_started = False
        self.pending: Pending | None = None
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = True

    @property
    def message_event(self) -> Exchange:
        """What uvicorn sets when the client has disconnected: this itself."""
        return self

    def set(self) -> None:
        """Cancels the work if the client has disconnected; uvicorn calls it as an event's `set`."""
        if self.disconnected and self.pending:
            self.pending.cancel()


class FastPath:
    """Starts requests of the simple form at once, and answers them from within the tick.

    Args:
        service: The service.
        rules: What pages in a browser may ask for.
    """

    def __init__(self, service: ServiceContext, rules: BrowserRules) -> None:
        self.service = service
        self._rules = rules if rules.origins or rules.hosts else None
        self.admit = service.decoding.admission.submit
        self.proxies = TrustedProxies(service.settings.trusted_proxies)
        # The default headers of answers, and the head of an answer with status 200 that is made of them.
        self.ok_head: tuple[list[tuple[bytes, bytes]], bytes] = [], b""
        surfaces = service.counts.surfaces
        self._step = Route(self._start_step, surfaces["sessions"], "/sessions/{id}/step", ADMITTED_BYTES)
        self._predict = Route(self._start_prediction, surfaces["predict"], "/predict", 0)
        self._predict_binary = Route(self._start_binary_prediction, surfaces["predict"], "/predict", 0)

    def route(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> Route | None:
        """Returns the route of a request; None where all such requests are the ASGI application's."""
        if url.startswith(_PREDICT):
            if url == _PREDICT and JSON in headers:
                return self._predict
            is_predict = url[len(_PREDICT) :][:1] in b"?"  # without a query, or with one
            return self._predict_binary if is_predict and _SAFETENSORS in headers else None
        return self._step if url.startswith(_BEGIN) and url.endswith(_END) and JSON in headers else None

    def _start_step(self, exchange: Exchange) -> bool:
        """Starts `POST /sessions/{id}/step` of one time step."""
        service = self.service
        if self._rules is not None and not self._rules.take_fast_path(exchange.headers):
            return False
        try:
            owner = service.known_owner(exchange.headers, exchange.connection.client)
            session = service.sessions.get(owner, exchange.url[len(_BEGIN) : -len(_END)].decode())
            x, key = parse_simple_step(session.model, exchange.body)
            if x is None:
                return False
            on_done = partial(self._answer_step, exchange, session)
            exchange.pending = service.writer.try_submit(session, x, True, key, on_done)
        except (*NOT_SIMPLE, Problem):
            return False
        return exchange.pending is not None

    def _answer_step(
        self, exchange: Exchange, session: Session, pending: PendingStep, outcome: StepResult | Exception
    ) -> None:
        if isinstance(outcome, Exception):
            self._answer_problem(exchange, outcome)
            return
        answer = step_json(self.service.sessions, session, outcome.y, outcome.position, True, True)
        self._answer(exchange, answer, (JSON, *REPLAY) if outcome.replayed else None)

    def _start_prediction(self, exchange: Exchange) -> bool:
        """Starts `POST /predict` of one sequence from zeros, in JSON."""
        if self._rules is not None and not self._rules.take_fast_path(exchange.headers):
            return False
        try:
            owner = self.service.known_owner(exchange.headers, exchange.connection.client)
            request = parse_prediction(exchange.body)
            engine = self.service.engine(request.model)
            sequences = engine.model.reader.plain_sequences(request.sequences, 1)
            if not sequences or request.states != LEFT_OUT:
                return False
            return self._predict_one(exchange, owner, engine, sequences[0], request, engine.model.outputs.json_bytes)
        except (*NOT_SIMPLE, Problem):
            return False

    def _start_binary_prediction(self, exchange: Exchange) -> bool:
        """Starts `POST /predict` of one sequence from zeros, in safetensors."""
        if self._rules is not None and not self._rules.take_fast_path(exchange.headers):
            return False
        try:
            owner = self.service.known_owner(exchange.headers, exchange.connection.client)
            options = safetensors.read_options(exchange.url[len(_PREDICT) + 1 :])
            engine = self.service.engine(options.model)
            sequences, states = safetensors.read(exchange.body, engine.model, 1)
            if states is not None:
                return False
            return self._predict_one(exchange, owner, engine, sequences[0], options, engine.model.outputs.step_bytes)
        except Problem:
            return False

    def _predict_one(
        self,
        exchange: Exchange,
        owner: str,
        engine: Engine,
        x: NDArray[Any],
        asked: PredictRequest[Any] | safetensors.Options,
        step_bytes: int,
    ) -> bool:
        """Starts a sequence, unless its answer is one to be sent in parts; `step_bytes` are those of a step in it."""
        every_output = wants_every_output(engine.model, asked.outputs)
        predict_only = engine.model.document.signature.predict_only is not None
        if predict_only or (every_output and len(x) * step_bytes > LARGE):
            return False
        on_done = partial(self._answer_prediction, exchange, engine.model, every_output)
        client = owner or address_identity(exchange.connection.client)
        exchange.pending = start_sequence(engine, x, every_output, asked.return_states, on_done, client)
        return True

    def _answer_prediction(
        self, exchange: Exchange, model: Model, every_output: bool, outcome: SequenceResult | Exception
    ) -> None:
        if isinstance(outcome, Exception):
            error = name_sequence(outcome, "sequences[0]") if isinstance(outcome, NotFinite) else outcome
            self._answer_problem(exchange, error)
            return
        states = None if outcome.states is None else [outcome.states]
        if exchange.route is self._predict_binary:
            answer = safetensors.write(model, [outcome.y], every_output, states)
            exchange.connection.respond(exchange, 200, answer, (_SAFETENSORS,))
        else:
            self._answer(exchange, prediction_json(model, [outcome.y], every_output, states))

    def _answer(self, exchange: Exchange, document: dict[str, Any], headers: Headers | None = None) -> None:
        body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        exchange.connection.respond(exchange, 200, body, headers)

    def _answer_problem(self, exchange: Exchange, error: Exception) -> None:
        context = RequestContext(new_id(), exchange.route.surface)
        scope = make_scope(context, method="POST", path=exchange.route.path)
        problem = as_problem(error, scope)
        headers = (*problem.headers(), (HEADER, context.id.encode()))
        exchange.connection.respond(exchange, problem.status, problem_body(problem, scope), headers)
