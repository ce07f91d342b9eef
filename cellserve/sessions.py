"""The two forms of a session, for threads and for asyncio; what they do is in `cellserve.session`."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from cellserve.calls import Call
from cellserve.layout import Given, Outputs, Tensors
from cellserve.predictions import States
from cellserve.rollouts import Rolled, Rolling, Rollout, asked
from cellserve.session import SessionCalls, State

if TYPE_CHECKING:
    from cellserve.client import AsyncClient, Client

T = TypeVar("T")


class Session(SessionCalls):
    """A session of a `Client`; get one from `Client.session` or `Client.attach`.

    Every change carries the position that it starts from and is tried again until it is answered: it is applied once,
    whatever was lost on the way. Threads that share it take turns. In a `with` block it is deleted at the end, unless
    `keep` is set. Every method raises CellserveError: GaveUp where there was no answer, a Problem where there was one.
    """

    def __init__(self, client: Client, *what: Any, **more: Any) -> None:
        super().__init__(client.retry, client.signatures, *what, **more)
        self._client = client

    def __enter__(self) -> Self:
        self._run(self.opened())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run(self.left(failed=kind is not None))

    def step(self, x: Given, outputs: Outputs | None = None) -> Tensors:
        """Steps it by one time step or several.

        Args:
            x: `[*features]`, or `[time, *features]`; of several inputs a dict, each by its name. Integers where the
                model takes them; of one integer a time step 5 is one step, [5, 6] are two.
            outputs: Of several time steps, `all` or the `last`; None for the model's default.

        Returns:
            y, in the model's type (float32 mostly): `[*outputs]`, or `[time, *outputs]` where all were wanted; of
            several outputs a dict, each by its name.
        """
        return self._run(self.stepped(x, outputs))

    def rollout(
        self,
        begin: str | Given,
        steps: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Rollout:
        """Lets it go on by itself, each output its next input.

        Args:
            begin: `[*features]` or `[time, *features]`, to be taken first; or a text, where the symbols are characters.
            steps: How many outputs are wanted. The last one is not taken in: to go on, begin with it.
            temperature: Of the drawing: below 1 the probable symbols come more often, at 0 always the most probable.
            top_k: Only so many symbols are drawn from, the most probable ones.
            seed: Of the drawing; the same gives the same.
        """
        return self._run(self.rolled_out(asked(begin, steps, temperature, top_k, seed)))

    def rollout_stream(
        self,
        begin: str | Given,
        steps: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> RolloutStream:
        """Lets it go on by itself, output by output: each is given as soon as it is applied.

        A lost connection is opened again, and goes on where it was: every output comes once. Whoever does not read to
        the end asks with `refresh` where the session is, once the server has seen that nobody reads (before that a
        change may meet a PositionConflict). Takes what `rollout` takes.

        Example:
            ```python
            with session.rollout_stream("Alice was ", 100, seed=1) as letters:
                for one in letters:
                    print(one.label, end="")
            ```
        """
        return RolloutStream(self, asked(begin, steps, temperature, top_k, seed))

    def reset(self) -> None:
        """Sets its state to zeros; the position moves by one."""
        self._run(self.was_reset())

    def fork(self, keep: bool = False) -> Session:
        """Makes another session with its state and position."""
        session_id, position = self._run(self.forked())
        return Session(self._client, session_id, self.model, None, keep, position, self.version)

    def state(self) -> State:
        """Downloads its state."""
        return self._run(self.state_read())

    def set_state(self, state: States) -> None:
        """Sets its state, an array `[*shape]` by each state's name; the position moves by one."""
        self._run(self.state_set(state))

    def refresh(self) -> int:
        """Asks the server where it is, and goes on from there: after a GaveUp, or where someone else moves it too."""
        return self._run(self.refreshed())

    def delete(self) -> None:
        """Deletes it."""
        self._run(self.deleted())

    def _run(self, call: Call[T]) -> T:
        with self._client.turns((self,)):
            return self._client.run(call)


class AsyncSession(SessionCalls):
    """A session of an `AsyncClient`: what Session is, for asyncio."""

    def __init__(self, client: AsyncClient, *what: Any, **more: Any) -> None:
        super().__init__(client.retry, client.signatures, *what, **more)
        self._client = client

    async def __aenter__(self) -> Self:
        await self._run(self.opened())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._run(self.left(failed=kind is not None))

    async def step(self, x: Given, outputs: Outputs | None = None) -> Tensors:
        """Steps it, as `Session.step` does."""
        return await self._run(self.stepped(x, outputs))

    async def rollout(
        self,
        begin: str | Given,
        steps: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Rollout:
        """Lets it go on by itself, as `Session.rollout` does."""
        return await self._run(self.rolled_out(asked(begin, steps, temperature, top_k, seed)))

    def rollout_stream(
        self,
        begin: str | Given,
        steps: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> AsyncRolloutStream:
        """Lets it go on by itself, output by output, as `Session.rollout_stream` does."""
        return AsyncRolloutStream(self, asked(begin, steps, temperature, top_k, seed))

    async def reset(self) -> None:
        """Sets its state to zeros; the position moves by one."""
        await self._run(self.was_reset())

    async def fork(self, keep: bool = False) -> AsyncSession:
        """Makes another session with its state and position."""
        session_id, position = await self._run(self.forked())
        return AsyncSession(self._client, session_id, self.model, None, keep, position, self.version)

    async def state(self) -> State:
        """Downloads its state."""
        return await self._run(self.state_read())

    async def set_state(self, state: States) -> None:
        """Sets its state, an array `[*shape]` by each state's name; the position moves by one."""
        await self._run(self.state_set(state))

    async def refresh(self) -> int:
        """Asks the server where it is, and goes on from there, as `Session.refresh` does."""
        return await self._run(self.refreshed())

    async def delete(self) -> None:
        """Deletes it."""
        await self._run(self.deleted())

    async def _run(self, call: Call[T]) -> T:
        async with self._client.turns((self,)):
            return await self._client.run(call)


class RolloutStream(Rolling):
    """The outputs of a session that goes on by itself, one after the other; after a GaveUp, `next` goes on."""

    def __init__(self, session: Session, document: dict[str, Any]) -> None:
        super().__init__(session, document)
        self._owner = session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Rolled:
        rolled = self._owner._run(self.following())
        if rolled is None:
            raise StopIteration
        return rolled

    def close(self) -> None:
        """Reads no further: the session goes no further then."""
        self._owner._run(self.left())


class AsyncRolloutStream(Rolling):
    """What RolloutStream is, for asyncio."""

    def __init__(self, session: AsyncSession, document: dict[str, Any]) -> None:
        super().__init__(session, document)
        self._owner = session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Rolled:
        rolled = await self._owner._run(self.following())
        if rolled is None:
            raise StopAsyncIteration
        return rolled

    async def close(self) -> None:
        """Reads no further: the session goes no further then."""
        await self._owner._run(self.left())
