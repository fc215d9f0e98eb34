"""From a model of transformers to a smaller file: export with free batch and length, optimize, compare the answers."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from transformers import BertConfig, BertForSequenceClassification

import onnxslim

torch.manual_seed(0)
# Weights by chance, so that nothing is fetched; yours come from BertForSequenceClassification.from_pretrained(...).
config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
config.return_dict = False  # tensors are what a graph can return
model = BertForSequenceClassification(config).eval()


def texts(count: int, length: int) -> dict[str, torch.Tensor]:
    """What a tokenizer returns."""
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(1000, (count, length)), "attention_mask": mask}


free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}
program = torch.onnx.export(
    model,
    kwargs=texts(2, 16),
    dynamo=True,
    dynamic_shapes={"input_ids": free, "attention_mask": free},
    output_names=["logits"],
    verbose=False,
)

samples = [{name: tensor.numpy() for name, tensor in texts(1, 24).items()} for _ in range(8)]
result = onnxslim.optimize(program, "simplify,fold", calibration=samples, bench_seconds=0.5)
result.save("slim.onnx")

batch = texts(3, 40)
session = onnxruntime.InferenceSession("slim.onnx")
(logits,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
with torch.no_grad():
    np.testing.assert_allclose(logits, model(**batch)[0].numpy(), atol=1e-4)
print(result.report.before["nodes"], "nodes before,", result.report.after["nodes"], "after")
