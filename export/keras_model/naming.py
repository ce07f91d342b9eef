"""Names that are the same whenever a network is built: of states and of ends, after their layers.

Keras numbers the layers that it names by what else the process has built: a network's `lstm` is another's `lstm_5`.
Here they are numbered by their order in the network, so that the states of one version fit the next.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

# How Keras makes a layer's name of its class; it has no public name for it.
from keras.src.utils.naming import to_snake_case


class Names:
    """Names layers and operations, each as often as it is called.

    Args:
        operations: All that may be named: names that users gave are kept for those that have them.
        taken: Names that are given away already.
    """

    def __init__(self, operations: Iterable[Any], taken: Iterable[str] = ()) -> None:
        self._own = {operation.name for operation in operations if not _automatic(operation)}
        self._taken = set(taken)

    def of(self, operation: Any) -> str:
        """Gives a name that was not given before: `lstm`, then `lstm_2`; where it is the user's own, that first."""
        own = not _automatic(operation)
        base = operation.name if own else to_snake_case(type(operation).__name__)
        for count in itertools.count(1):
            name = base if count == 1 else f"{base}_{count}"
            if name not in self._taken and (name not in self._own or (own and name == base)):
                break
        self._taken.add(name)
        return str(name)


def _automatic(operation: Any) -> bool:
    """Says whether Keras has made the name: the class's in snake case, with a number from the second on."""
    return re.fullmatch(rf"{re.escape(to_snake_case(type(operation).__name__))}(_\d+)?", operation.name) is not None
