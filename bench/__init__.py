"""Suites that print the tables of the README: onnxslim beside its peers, in one run; see bench/zoo.py."""
