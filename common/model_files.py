"""What the files of a model say, read without loading it.

Invariant: nothing here imports torch or transformers or touches weights, so that a recipe can be checked on a
login node in well under a second.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.hub import prepare_hub

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Llama / Qwen2 family.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: as in config.json.
        tied: output head shares the embedding.
        attention_bias: query, key and value projections have a bias (Qwen2).
        context: longest sequence, in tokens.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool
    context: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        embedding = self.vocab * self.hidden * (1 if self.tied else 2)
        return embedding + self.layers * self.layer_parameters + self.hidden

    @property
    def layer_parameters(self) -> int:
        """Number of weights of one decoder layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (query + 2 * key) + query * self.hidden
        bias = (query + 2 * key) if self.attention_bias else 0
        return attention + bias + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _qwen25(
    hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool, context: int
) -> ModelShape:
    return ModelShape(28, hidden, intermediate, heads, kv_heads, 128, vocab, tied, True, context)


_LLAMA_3B = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, True, False, 131072)
# The paper's models, so that their recipes can be checked where there is no network (their public config.json).
KNOWN_SHAPES: dict[str, ModelShape] = {
    "Qwen/Qwen2.5-Math-1.5B": _qwen25(1536, 8960, 12, 2, 151936, True, 4096),
    "Qwen/Qwen2.5-Math-7B": _qwen25(3584, 18944, 28, 4, 152064, False, 4096),
    "Qwen/Qwen2.5-1.5B": _qwen25(1536, 8960, 12, 2, 151936, True, 131072),
    "Qwen/Qwen2.5-7B": _qwen25(3584, 18944, 28, 4, 152064, False, 131072),
    "lkevinzc/Llama-3.2-3B-NuminaQA": _LLAMA_3B,
    "meta-llama/Llama-3.2-3B": _LLAMA_3B,
}


def looks_like_hub_id(path: str) -> bool:
    """Whether a path may be a hub id (owner/name) rather than a folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.exists()


def model_folder(path: str) -> Path:
    """The local folder of a model: `path` itself, or the hub's cached download of its small files.

    Raises:
        UserError: neither a folder with a config.json nor a model that the hub gives.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not looks_like_hub_id(path):
        raise UserError(f"'{path}' is not a folder with a config.json.", setting="model.path")
    return _from_hub(path)


def _from_hub(path: str) -> Path:
    prepare_hub()
    from huggingface_hub import snapshot_download

    small_files = ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=small_files))
    except Exception as error:  # the hub raises a dozen kinds: absent, gated, offline
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' is not a folder, and the hub does not give it ({reason}).", setting="model.path"
        ) from None


def require_weights(path: str) -> None:
    """Raise UserError unless a model is a local folder, or its weights are in this machine's hub cache.

    For machines that will have no network of their own. Asks nobody: neither hub nor weights are read.
    """
    if Path(path).exists() or not looks_like_hub_id(path):
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = _has_weights(Path(snapshot_download(path, local_files_only=True)))
    except LocalEntryNotFoundError:
        found = False
    if not found:
        raise UserError(
            f"the weights of '{path}' are not in the Hugging Face cache (HF_HOME), and nodes may have no way to the "
            f"hub: fetch them here with `hf download {path}`, or name a folder.",
            setting="model.path",
        )


def _has_weights(folder: Path) -> bool:
    """Whether a model's folder has every file of its weights, in one of their formats."""
    for kind in WEIGHT_FILES:
        try:
            index = json.loads((folder / f"{kind}.index.json").read_text(encoding="utf-8"))
            shards = set(index["weight_map"].values())
        except (OSError, ValueError, KeyError):
            shards = {kind}
        if all((folder / name).is_file() for name in shards):
            return True
    return False


def read_config(path: str) -> dict[str, Any]:
    """config.json of a model; see `model_folder`."""
    file = model_folder(path) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}.", setting="model.path") from None


def read_shape(path: str) -> ModelShape:
    """Sizes of the model; raises UserError when config.json lacks one."""
    config = read_config(path)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return ModelShape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
            context=int(config["max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json of '{path}' has no usable {error}.", setting="model.path") from None


def require_tokenizer(path: str) -> None:
    """Raise UserError unless the model's folder brings a tokenizer."""
    folder = model_folder(path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"'{path}' has no tokenizer ({' or '.join(TOKENIZER_FILES)}).", setting="model.path")


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary (of a transformers tokenizer): all of a run must mean the same by the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
