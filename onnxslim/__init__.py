"""Make any ONNX file smaller and faster, with the proof that it is still right."""
