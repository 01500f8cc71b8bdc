"""Errors that the outside world causes; our own bugs are assertions.

Every message is one sentence that names the option or feature, its value and the remedy.
"""


class MoeOffloadError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MoeOffloadError):
    """An option is unknown, has the wrong type or an impossible value."""


class CapacityError(MoeOffloadError):
    """Something does not fit: slots on the device, or experts in a bank."""


class UnsupportedModelError(MoeOffloadError):
    """A model, a weight format or a vLLM feature cannot be served from slots."""


class IntegrityError(MoeOffloadError):
    """Data is not what it has to be: an expert id out of range, or a pass that changes the result."""


class TransferError(MoeOffloadError):
    """A copy from a bank failed."""
