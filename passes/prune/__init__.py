"""The public pass; see `Prune`."""

from onnxslim.passes.prune.prune import Prune

__all__ = ["Prune"]
