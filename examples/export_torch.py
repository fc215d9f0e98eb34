"""From a PyTorch module to a smaller file: export, optimize with sample inputs, save, and write the report."""

from __future__ import annotations

import torch

import onnxslim

torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3, padding=1),
    torch.nn.BatchNorm2d(16),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(16, 10),
).eval()
example = torch.randn(1, 3, 32, 32)
program = torch.onnx.export(module, (example,), dynamo=True, input_names=["image"], verbose=False)

batches = [{"image": torch.randn(1, 3, 32, 32).numpy()} for _ in range(16)]
result = onnxslim.optimize(program, "simplify,fold", calibration=batches, bench_seconds=0.5, details=True)
result.save("slim.onnx")
with open("report.html", "w", encoding="utf-8") as file:  # noqa: PTH123 an example stays plain
    file.write(result.report.to_html("export_torch"))
print(result.report.before["nodes"], "nodes before,", result.report.after["nodes"], "after")
