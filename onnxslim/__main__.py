"""``python -m onnxslim``: the command line."""

from onnxslim.cli import main

if __name__ == "__main__":
    main()
