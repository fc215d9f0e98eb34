"""`yolo export format=onnx simplify=True`: Ultralytics calls ``onnxslim.slim`` on the message, and saves the answer.

Where Ultralytics is not installed, what it does is done with a detector of transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx

if importlib.util.find_spec("ultralytics"):
    from ultralytics import YOLO

    # The .yaml alone has weights by chance, so that nothing is fetched; yours are in yolo11n.pt.
    path = Path(YOLO("yolo11n.yaml").export(format="onnx", imgsz=64, simplify=True))
else:
    import torch
    from transformers import YolosConfig, YolosForObjectDetection

    import onnxslim

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = YolosConfig(image_size=[64, 64], num_detection_tokens=10, **small)
    model = YolosForObjectDetection(config).eval()
    path = Path("yolos.onnx")
    torch.onnx.export(model, (torch.zeros(1, 3, 64, 64),), dynamo=True, verbose=False).save(path)

    model_onnx = onnx.load(path)
    model_onnx = onnxslim.slim(model_onnx)
    for key, value in {"task": "detect", "stride": 32}.items():
        entry = model_onnx.metadata_props.add()
        entry.key, entry.value = key, str(value)
    model_onnx.ir_version = min(model_onnx.ir_version, 10)
    onnx.save(model_onnx, path)

made = onnx.load(path)
onnx.checker.check_model(made)
assert {"onnxslim.version", "stride"} <= {entry.key for entry in made.metadata_props}
print(len(made.graph.node), "nodes")
