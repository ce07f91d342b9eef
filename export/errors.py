"""The ways in which an export ends without a model, each with what to do about it."""


class ExportError(Exception):
    """A network that cannot be exported; the message names the layer, says why, and what to do instead."""


class ProofFailed(ExportError):
    """The converted model does not do what Keras does; nothing is written."""


class Unsteppable(ExportError):
    """A network that reads whole sequences only; the message names the layer and says why."""
