"""The passes of onnxslim: one public pass per file, the file named like the pass."""
