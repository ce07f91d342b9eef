"""uvicorn's server, whose application always gets to end: it closes the store."""

from __future__ import annotations

import logging
import socket

import uvicorn

log = logging.getLogger("cellserve")


class OrderlyServer(uvicorn.Server):
    """uvicorn's server; a second Ctrl+C ends its waiting, where uvicorn would leave out the application's end too."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes what is under way, unless it is told not to wait, and ends the application."""
        await super().shutdown(sockets)
        if self.force_exit:
            log.warning("stopped again: %d requests are dropped", len(self.server_state.tasks))
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()  # at once if it has ended already
