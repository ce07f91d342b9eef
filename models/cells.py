"""The recurrent cells of the article *Basic RNN/LSTM cell implementation* (2021), as Keras 3 layers.

A cell is one recurrent step, ``(x_t, states) -> (y_t, new states)``; ``keras.layers.RNN(cell)`` runs it over time,
``keras.layers.StackedRNNCells`` stacks it, and masks, saving and mixed precision are theirs to handle.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

FEEDBACKS = ("hidden", "output")


class _Cell(keras.layers.Layer):
    """Base of the two cells: checked arguments, named initializers and regularizers, zero states, `get_config`."""

    state_names: tuple[str, ...]

    def __init__(
        self,
        units: int,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(units, bool) or not isinstance(units, int) or units <= 0:
            raise ValueError(f"{type(self).__name__}: units must be a positive integer, got units={units!r}")
        super().__init__(**kwargs)
        self.units = units
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.output_size = units

    def _features(self, input_shape: tuple[int | None, ...]) -> int:
        features = input_shape[-1] if len(input_shape) == 2 else None
        if features is None:
            raise ValueError(
                f"{type(self).__name__}: a cell takes one time step of shape [batch, features] with a known number of "
                f"features, got shape {tuple(input_shape)}; wrap it in keras.layers.RNN to run it over "
                f"[batch, time, features]"
            )
        return features

    def _kernel(self, name: str, rows: int) -> Any:
        initializer = self._initializer_of_its_own(self.kernel_initializer)
        return self.add_weight(
            (rows, self.units), initializer=initializer, regularizer=self.kernel_regularizer, name=name
        )

    def _bias(self, name: str) -> Any:
        initializer = self._initializer_of_its_own(self.bias_initializer)
        return self.add_weight((self.units,), initializer=initializer, regularizer=self.bias_regularizer, name=name)

    def _initializer_of_its_own(self, initializer: Any) -> Any:
        """A fresh initializer: a Keras 3 initializer repeats its numbers, which would make all gates equal."""
        if not isinstance(initializer, keras.initializers.Initializer):
            return initializer
        config = initializer.get_config()
        if isinstance(config.get("seed"), int):
            config["seed"] += len(self.variables)
        return type(initializer).from_config(config)

    def get_initial_state(self, batch_size: int | None = None) -> list[Any]:
        """Returns the states before the first step: zeros, each `[batch_size, units]` in the compute dtype."""
        return [ops.zeros((batch_size, self.units), dtype=self.compute_dtype) for _ in self.state_names]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, from which `from_config` makes the same cell without its weights."""
        return {
            **super().get_config(),
            "units": self.units,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


@keras.saving.register_keras_serializable(package="cellserve")
class RNNCell(_Cell):
    """The simple recurrent cell: Elman's network, or Jordan's where the output is what is fed back.

    With weights `W_xh [features, units]`, `W_hh` and `W_hy [units, units]`, `b_h` and `b_y [units]`::

        h_t = tanh(x_t W_xh + s_{t-1} W_hh + b_h)        y_t = h_t W_hy + b_y
        s_t = h_t  (feedback="hidden")                   s_t = y_t  (feedback="output")

    The article's equations feed the hidden state back; its listing returns the output as the state, which is the
    other network. Corrected from the listing: it multiplies weight by input (`W x` with row vectors) where `x W` is
    meant, and draws on the retired `keras.backend`.

    Args:
        units: Positive integer, the width of the hidden state and of the output.
        feedback: `"hidden"` (Elman, the article's equations) or `"output"` (Jordan, the article's listing).
        kernel_initializer: Initializer of `W_xh`, `W_hh` and `W_hy`. Default `"glorot_uniform"`.
        bias_initializer: Initializer of `b_h` and `b_y`. Default `"zeros"`.
        kernel_regularizer: Regularizer of the three matrices. Default none.
        bias_regularizer: Regularizer of the two biases. Default none.

    Call arguments:
        inputs: One time step, `[batch, features]`.
        states: A list of one tensor, `[batch, units]`.

    Raises:
        ValueError: `units` is not a positive integer, `feedback` is unknown, or the input is not
            `[batch, features]`.

    Example:
        >>> layer = keras.layers.RNN(RNNCell(32, feedback="output"), return_sequences=True)
        >>> layer(np.zeros((8, 50, 16), "float32")).shape
        TensorShape([8, 50, 32])

    Reference:
        J. Elman, Finding Structure in Time, 1990; M. Jordan, Serial Order, 1986; the article's section on RNNs.
    """

    def __init__(self, units: int, feedback: str = "hidden", **kwargs: Any) -> None:
        if feedback not in FEEDBACKS:
            raise ValueError(f"RNNCell: feedback must be one of {FEEDBACKS}, got feedback={feedback!r}")
        super().__init__(units, **kwargs)
        self.feedback = feedback
        self.state_names = ("h",) if feedback == "hidden" else ("y",)
        self.state_size = units

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs of shape `[batch, features]`."""
        features = self._features(input_shape)
        self.W_xh = self._kernel("W_xh", features)
        self.W_hh = self._kernel("W_hh", self.units)
        self.b_h = self._bias("b_h")
        self.W_hy = self._kernel("W_hy", self.units)
        self.b_y = self._bias("b_y")
        self.built = True

    def call(self, inputs: Any, states: list[Any], training: bool = False) -> tuple[Any, list[Any]]:
        """Takes `x_t [batch, features]` and `[s [batch, units]]`; returns `y_t [batch, units]` and the next states."""
        # The sum is grouped so that all which does not depend on the state can be computed ahead for every time step.
        h = ops.tanh((ops.matmul(inputs, self.W_xh) + self.b_h) + ops.matmul(states[0], self.W_hh))
        y = ops.matmul(h, self.W_hy) + self.b_y
        return y, [h if self.feedback == "hidden" else y]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, from which `from_config` makes the same cell without its weights."""
        return {**super().get_config(), "feedback": self.feedback}


@keras.saving.register_keras_serializable(package="cellserve")
class LSTMCell(_Cell):
    """The long short-term memory cell, gates computed from the previous output and the input put side by side.

    With weights `W_f`, `W_i`, `W_c`, `W_o [units + features, units]` and biases `b_f`, `b_i`, `b_c`, `b_o [units]`::

        z = [h_{t-1}, x_t]       f = σ(z W_f + b_f)       i = σ(z W_i + b_i)       ĉ = tanh(z W_c + b_c)
        c_t = f∘c_{t-1} + i∘ĉ    o = σ(z W_o + b_o)       h_t = o∘tanh(c_t)

    The output is `h_t`, the states are `[h_t, c_t]`. Corrected from the article's listing: it multiplies weight by
    input (`W z` with row vectors) where `z W` is meant, sizes the weights as twice the input where `units + features`
    is meant, uses a `b_o` that it never makes, declares one state for two, and uses the retired `keras.backend`.

    Args:
        units: Positive integer, the width of the output and of both states.
        kernel_initializer: Initializer of the four matrices. Default `"glorot_uniform"`.
        bias_initializer: Initializer of the four biases. Default `"zeros"`.
        kernel_regularizer: Regularizer of the four matrices. Default none.
        bias_regularizer: Regularizer of the four biases. Default none.

    Call arguments:
        inputs: One time step, `[batch, features]`.
        states: A list of two tensors, `h` and `c`, each `[batch, units]`.

    Raises:
        ValueError: `units` is not a positive integer, or the input is not `[batch, features]`.

    Example:
        >>> cells = keras.layers.StackedRNNCells([LSTMCell(64), LSTMCell(32)])
        >>> keras.layers.RNN(cells)(np.zeros((8, 50, 16), "float32")).shape
        TensorShape([8, 32])

    Reference:
        S. Hochreiter and J. Schmidhuber, Long Short-Term Memory, 1997; the article's section on LSTMs.
    """

    state_names = ("h", "c")

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.state_size = [units, units]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs of shape `[batch, features]`."""
        rows = self.units + self._features(input_shape)
        self.W_f, self.b_f = self._kernel("W_f", rows), self._bias("b_f")
        self.W_i, self.b_i = self._kernel("W_i", rows), self._bias("b_i")
        self.W_c, self.b_c = self._kernel("W_c", rows), self._bias("b_c")
        self.W_o, self.b_o = self._kernel("W_o", rows), self._bias("b_o")
        self.built = True

    def call(self, inputs: Any, states: list[Any], training: bool = False) -> tuple[Any, list[Any]]:
        """Takes `x_t [batch, features]`, `[h, c]` of `[batch, units]`; returns `h_t` and `[h_t, c_t]`."""
        h, c = states
        z = ops.concatenate([h, inputs], axis=-1)
        f = ops.sigmoid(ops.matmul(z, self.W_f) + self.b_f)
        i = ops.sigmoid(ops.matmul(z, self.W_i) + self.b_i)
        candidate = ops.tanh(ops.matmul(z, self.W_c) + self.b_c)
        c = f * c + i * candidate
        o = ops.sigmoid(ops.matmul(z, self.W_o) + self.b_o)
        h = o * ops.tanh(c)
        return h, [h, c]
