"""Real models and data for tests and benchmarks: fetched from registry packages, or trained here; never installed."""

import os

# Before onnxruntime is imported, as in `onnxslim`: it would report the models it loads.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
