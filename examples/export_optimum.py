"""`optimum-cli export onnx --slim`: Optimum calls ``onnxslim.slim`` on every file that it exports.

Where Optimum is not installed, its call is made on a file that PyTorch exports.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from transformers import BertConfig, BertModel

try:
    from optimum.exporters.onnx import main_export
except ImportError:
    main_export = None

torch.manual_seed(0)
# Weights by chance, so that nothing is fetched.
model = BertModel(
    BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
).eval()
folder = Path("bert_onnx")
folder.mkdir()
if main_export is not None:
    model.save_pretrained("bert")
    main_export("bert", folder, task="feature-extraction", slim=True)
else:
    from onnxslim import slim

    model.config.return_dict = False
    tokens = torch.ones(1, 16, dtype=torch.int64)
    torch.onnx.export(
        model,
        kwargs={"input_ids": tokens, "attention_mask": tokens},
        dynamo=True,
        verbose=False,
    ).save(folder / "model.onnx")
    slimmed = slim(str(folder / "model.onnx"))
    assert slimmed is not None
    onnx.checker.check_model(slimmed)
    onnx.save(slimmed, folder / "model.onnx")

made = onnx.load(folder / "model.onnx")
assert "onnxslim.version" in {entry.key for entry in made.metadata_props}
print(len(made.graph.node), "nodes")
