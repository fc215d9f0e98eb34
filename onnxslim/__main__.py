"""``python -m onnxslim``: the command line."""

from onnxslim.cli import entry

if __name__ == "__main__":
    entry()
