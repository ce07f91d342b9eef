"""What is known of each model before a GPU is seen: Keras's numbers over many steps, from random states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROWS, STEPS = 4, 200
TOLERANCE, STRAYING = 1e-5, 4.0  # of parity, as the export has them


@dataclass(frozen=True, slots=True)
class Reference:
    """What goes into a model, and what Keras makes of it, in float32 and in float64."""

    x: Array  # [rows, steps, *features]
    states: list[Array]  # to start from, each [rows, *shape]
    y: Array  # [rows, steps, *outputs], float32
    final: list[Array]  # each [rows, *shape], float32
    exact_y: Array  # as y, float64
    exact_final: list[Array]  # as final, float64

    def write(self, path: Path) -> None:
        """Writes it to an .npz file."""
        named = {"x": self.x, "y": self.y, "exact_y": self.exact_y}
        for kind, tensors in (("state", self.states), ("final", self.final), ("exact_final", self.exact_final)):
            named |= {f"{kind}.{place}": tensor for place, tensor in enumerate(tensors)}
        np.savez_compressed(path, **named)  # type: ignore[arg-type]  # the stub takes them for `allow_pickle`

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Reads it back."""
        with np.load(path) as named:

            def each(kind: str) -> list[Array]:
                return [named[f"{kind}.{place}"] for place in range(sum(name.startswith(f"{kind}.") for name in named))]

            return cls(
                named["x"], each("state"), named["y"], each("final"), named["exact_y"], each("exact_final")
            )  # fmt: skip

    @property
    def allowed(self) -> float:
        """What a result may be off: 1e-5, or four times what float32 Keras itself is off a float64 run.

        Here for all steps together, since few networks need more than the tolerance.
        """
        return max(TOLERANCE, STRAYING * self.keras_error)

    @property
    def keras_error(self) -> float:
        """How far float32 Keras is off float64 Keras, at the worst place."""
        return worst((self.y, *self.final), (self.exact_y, *self.exact_final))

    def error(self, y: Array, final: list[Array]) -> float:
        """How far a run's outputs and last states are off Keras's, at the worst place."""
        return worst((y, *final), (self.y, *self.final))


def worst(ours: tuple[Array, ...], true: tuple[Array, ...]) -> float:
    """Gives the largest `|ours - true| / max(1, |true|)`; infinite where a number of ours is not finite."""
    most = 0.0
    for one, other in zip(ours, true, strict=True):
        wide = other.astype(np.float64)
        off = np.abs(one.astype(np.float64) - wide) / np.maximum(1, np.abs(wide))
        most = max(most, float(np.where(np.isfinite(off), off, np.inf).max()))
    return most


def names(folder: Path) -> list[str]:
    """Gives the models that a folder has references of."""
    return sorted(path.stem for path in folder.glob("*.npz"))


def model_folder(folder: Path, name: str) -> Path:
    """Gives where a model's files are: its one version in the folder's repository."""
    return folder / "artifacts" / name / "1"
