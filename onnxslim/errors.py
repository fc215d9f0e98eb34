"""Every error that onnxslim raises on purpose.

    OnnxslimError
    ├── InputError          what the user gave cannot be used                      exit code 2
    │   ├── ModelError      not an ONNX file, broken, or of an unsupported kind
    │   ├── DataError       calibration or evaluation data that does not fit the model
    │   └── UsageError      an unknown pass, option, metric or execution provider
    └── CheckError          a result that broke its promise (wrong outputs, a budget missed)  exit code 1

A message says what is wrong, where (file, node or tensor) and what to do about it. Anything else that escapes is a
defect of onnxslim: exit code 123.
"""


class OnnxslimError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 123


class InputError(OnnxslimError):
    """Something given by the user cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """The model is not ONNX, is broken, or needs something that is not supported."""


class DataError(InputError):
    """The calibration or evaluation data does not fit the model."""


class UsageError(InputError):
    """An unknown or contradictory pass, option, metric or execution provider."""


class CheckError(OnnxslimError):
    """A result broke its promise: its outputs differ too much, or a budget was missed."""

    exit_code = 1
