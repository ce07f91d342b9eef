"""Imports TensorFlow silently: it writes to the process's error stream before its log level can be set."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras with no GPU visible (cuDNN operators do not convert) and nothing printed.

    Raises:
        ImportError: TensorFlow is not installed; the message names the extra that brings it.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it prints a notice, and its bits differ between processors
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["KERAS_BACKEND"] = "tensorflow"
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow as tf

            tf.constant(0) + tf.constant(0)  # the first operation makes it look for devices
        except ImportError as error:
            raise ImportError(
                f"training and exporting need TensorFlow, which cannot be imported here ({error}): "
                f"in a clone, pip install '.[export]'"
            ) from None
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
    for name in ("tensorflow", "tf2onnx", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(keras|tensorflow|tf2onnx)\..*")
