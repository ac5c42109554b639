"""Errors that a user can act on.

RayRMError
├── ConfigError          a value, a field or a path in a config is wrong
├── SchemaError          rows lack a column, or a column has another type than its contract
├── OutputExistsError    the output holds the work of another config
├── EvaluationError      too many records failed, or nothing is left to measure
├── CheckpointError      a model or checkpoint is missing, incomplete or broken
├── ResourceError        the cluster can never give what was asked for
└── ServiceError         an HTTP service refuses a request, or cannot be reached

A message says what, where, what was found, and what would do.
"""


class RayRMError(Exception):
    """Base of all errors that end a job with one sentence and a non-zero exit code."""


class ConfigError(RayRMError):
    """A config value, field or path is wrong."""


class SchemaError(RayRMError):
    """Rows do not fulfil the contract of their type."""


class OutputExistsError(RayRMError):
    """The output path holds the work of another config or of other inputs."""


class EvaluationError(RayRMError):
    """Too many records failed, or nothing is left to measure."""


class CheckpointError(RayRMError):
    """A model or checkpoint is missing, incomplete or broken."""


class ResourceError(RayRMError):
    """The cluster can never give what was asked for."""


class ServiceError(RayRMError):
    """An HTTP service refuses a request, or cannot be reached."""
