"""What our protocols need of uvicorn and websockets beyond what they promise: an upgrade that changes it is named."""

from __future__ import annotations

import inspect

import uvicorn
from uvicorn.middleware.proxy_headers import _TrustedHosts
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.protocol import Protocol
from websockets.server import ServerProtocol

WHERE = f"uvicorn {uvicorn.__version__} has changed what api/connections/ and api/client_identity.py need: "

METHODS: dict[type, dict[str, list[str]]] = {
    httptools_impl.HttpToolsProtocol: {
        "_start_asgi_task": ["cycle", "app"],
        "connection_lost": ["exc"],
        "on_message_begin": [],
        "on_header": ["name", "value"],
        "on_headers_complete": [],
        "on_body": ["body"],
        "on_message_complete": [],
        "on_response_complete": [],
        "data_received": ["data"],
        "handle_websocket_upgrade": [],
        "_should_upgrade": [],
        "shutdown": [],
    },
    WebSocketsSansIOProtocol: {
        "data_received": ["data"],
        "handle_connect": ["event"],
        "handle_cont": ["event"],
        "handle_parser_exception": [],
        "handle_ping": [],
        "pause_writing": [],
        "receive": [],
        "resume_writing": [],
        "send_receive_event_to_app": [],
    },
    _TrustedHosts: {"__contains__": ["host"], "get_trusted_client_address": ["x_forwarded_for"]},
    FlowControl: {"pause_writing": [], "resume_reading": [], "resume_writing": []},
}
HTTP = ("cycle", "expect_100_continue", "flow", "headers", "parser", "pipeline", "server_state", "transport", "url")
WEBSOCKET = (
    "close_sent", "conn", "curr_msg_data_type", "frames", "handshake_complete", "handshake_initiated", "queue",
    "read_paused", "writable",
)  # fmt: skip


def test_the_methods_that_the_fast_path_overrides_are_there() -> None:
    for kind, methods in METHODS.items():
        for name, arguments in methods.items():
            assert hasattr(kind, name), f"{WHERE}{kind.__name__} has no {name}"
            found = list(inspect.signature(getattr(kind, name)).parameters)[1:]
            assert found == arguments, f"{WHERE}{kind.__name__}.{name} takes {found}"
    assert 200 in httptools_impl.STATUS_LINE, f"{WHERE}there is no STATUS_LINE"


def test_the_attributes_that_the_fast_path_reads_are_there() -> None:
    sources = {
        httptools_impl.HttpToolsProtocol: HTTP,
        WebSocketsSansIOProtocol: WEBSOCKET,
        # A request on the fast path stands in for one of these.
        httptools_impl.RequestResponseCycle: ("disconnected", "keep_alive", "message_event", "response_complete"),
        ServerState: ("default_headers", "total_requests"),
        FlowControl: ("_transport", "read_paused", "write_paused"),
        Protocol: ("current_size", "parser", "reader", "writes"),
        ServerProtocol: ("handshake_exc",),
    }
    for kind, names in sources.items():
        source = inspect.getsource(kind)
        for name in names:
            assert f"self.{name}" in source, f"{WHERE}{kind.__name__} has no {name}"
