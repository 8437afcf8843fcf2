"""Tiny models with random weights, made here in a moment: no download, no transformers, the same bytes every time.

Their norm weights are random too, so that a wrong norm shows in the logits.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norm_plugin.tiny_models import architectures, shapes
from norm_plugin.tiny_models.architectures import ARCHITECTURES, BOS, EOS, PAD, Architecture
from norm_plugin.tiny_models.shapes import POSITIONS, TINY, VOCAB, WIDE, Sizes

NAMES = tuple(ARCHITECTURES)

SPECIAL = {BOS: "<s>", EOS: "</s>", PAD: "<pad>", PAD + 1: "<unk>"}
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "


def names(engine: str) -> tuple[str, ...]:
    """The models that an engine runs on every device."""
    return tuple(name for name, architecture in ARCHITECTURES.items() if engine in architecture.engines)


def cache() -> Path:
    """Where the models are kept: another folder for every version of what makes them."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    sources = b"".join(Path(source).read_bytes() for source in (__file__, architectures.__file__, shapes.__file__))
    return Path(root) / "norm_plugin" / "tiny" / hashlib.sha256(sources).hexdigest()[:12]


def sizes_for(device: str) -> Sizes:
    """The sizes of the models that `verify` makes for a device."""
    return WIDE if device == "cuda" else TINY


def make(name: str, folder: Path | None = None, sizes: Sizes = TINY) -> Path:
    """The folder of a tiny model inside `folder` (the cache), made if it is not there.

    It appears there complete or not at all, so that two processes may make it at once.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"tiny:{name} is not a tiny model; there are {', '.join(NAMES)}, and tiny:all.")
    place = (folder or cache() / f"hidden-{sizes.hidden}") / name
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=place.parent))
    try:
        _write(architectures.architectures(sizes)[name], made)
        made.chmod(0o755)  # mkdtemp's is for its owner alone
        made.rename(place)
    except OSError:
        if not place.is_dir():  # else somebody else was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place


def _write(architecture: Architecture, folder: Path) -> None:
    files: dict[str, Any] = {
        "config.json": architecture.config,
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": POSITIONS,
            "clean_up_tokenization_spaces": False, "chat_template": CHAT,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {name: _weight(architecture, name, shape) for name, shape in architecture.shapes.items()}
    _save(tensors, folder / "model.safetensors")


# --- weights ------------------------------------------------------------------------------------------------------


def _weight(architecture: Architecture, name: str, shape: tuple[int, ...]) -> Tensor:
    """Random, and such that logits are spread and every norm matters; each tensor has a seed of its own."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return (1 + 4 * noise.abs()).log()
    if last in ("dt_bias", "D"):
        return 1 + 0.1 * noise
    if last == "bias":
        return 0.1 * noise
    if len(shape) == 1:
        return _norm_weight(architecture, name, noise)
    if "embed" in name or ".wte" in name or ".wpe" in name:
        return noise * _embedding_scale(architecture, name)
    fan_in = shape[0] if ".c_" in name else shape[-1]  # GPT-2 keeps its linear weights the other way round
    return noise * (1.5 / math.sqrt(fan_in))


def _norm_weight(architecture: Architecture, name: str, noise: Tensor) -> Tensor:
    one_plus = architecture.one_plus and "linear_attn" not in name
    middle, spread = (0.0 if one_plus else 1.0), 0.3
    if architecture.tied and name in ("model.norm.weight", "transformer.ln_f.weight"):
        middle, spread = (8.0, 2.0) if one_plus else (3.0, 0.5)  # what the small embedding took from the logits
    return middle + spread * noise


def _embedding_scale(architecture: Architecture, name: str) -> float:
    if not architecture.tied:
        return 1.0
    # a large tied embedding makes a model repeat its last token; Gemma multiplies it by the root of the width
    scale = 0.02 if architecture.one_plus else 0.1
    return 0.3 * scale if ".wpe" in name else scale


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """The safetensors format: the length of a JSON header, the header, and the bytes that its offsets point into."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = []
    end = 0
    for name, tensor in tensors.items():
        tensor = tensor.bfloat16().contiguous()
        data.append(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *data]))


# --- tokenizer ----------------------------------------------------------------------------------------------------


def _tokenizer() -> dict[str, Any]:
    """A token for each byte, and names for the rest of the vocabulary, so that every answer can be printed."""
    tokens = dict(enumerate(_byte_characters()))
    names = {i: tokens.get(i) or SPECIAL.get(i) or f"<extra_{i}>" for i in range(VOCAB)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": name, **plain} for i, name in SPECIAL.items()],
        "pre_tokenizer": level, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {name: i for i, name in names.items()}, "merges": [],
        },
    }  # fmt: skip


def _byte_characters() -> str:
    """The character that byte-level BPE writes for each byte: itself if it can be seen, else one past Latin-1."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return "".join(chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256))
