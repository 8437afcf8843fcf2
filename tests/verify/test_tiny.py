"""The tiny models: complete or not there, the same bytes every time, norms that show. Engines load them elsewhere."""

import itertools
import json
import multiprocessing
import struct
from pathlib import Path

import pytest
import torch

from norm_plugin.tiny_models import checkpoint
from norm_plugin.tiny_models.architectures import ARCHITECTURES
from norm_plugin.tiny_models.shapes import VOCAB

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def load(path: Path) -> dict[str, torch.Tensor]:
    """A reader of its own: the format is the specification, not our writer."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    del header["__metadata__"]
    tensors = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        flat = torch.frombuffer(body, dtype=torch.bfloat16, count=(end - begin) // 2, offset=begin)
        tensors[name] = flat.reshape(about["shape"])
    return tensors


@pytest.mark.parametrize("name", checkpoint.NAMES)
def test_a_model_is_complete(name: str, tmp_path: Path) -> None:
    folder = checkpoint.make(name, tmp_path)
    assert folder == tmp_path / name
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == VOCAB
    tensors = load(folder / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == ARCHITECTURES[name].shapes
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("name", checkpoint.NAMES)
def test_every_norm_weight_is_random(name: str, tmp_path: Path) -> None:
    tensors = load(checkpoint.make(name, tmp_path) / "model.safetensors")
    norms = {key: t for key, t in tensors.items() if t.dim() == 1 and key.endswith("weight")}
    assert len(norms) > 4
    for key, weight in norms.items():
        assert weight.float().std() > 0.15, f"{key} could be left out unseen"
    drawn = list(norms.values())
    for first, second in itertools.pairwise(drawn):
        assert first.shape != second.shape or not torch.equal(first, second), "two norms could be exchanged unseen"


def test_a_model_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        torch.randn(3)  # the state of the global generator must not matter
        checkpoint.make("gemma3", tmp_path / folder)
    for file in FILES:
        first, second = (tmp_path / folder / "gemma3" / file for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_a_token_for_every_byte_and_every_number(tmp_path: Path) -> None:
    model = json.loads((checkpoint.make("llama", tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert sorted(model["vocab"].values()) == list(range(VOCAB))
    assert model["vocab"]["A"] == 65
    assert model["vocab"]["Ġ"] == 32  # as GPT-2 writes a space


def made_together(folder: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    checkpoint.make("llama", folder)


def test_two_makers_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(3)
    makers = [spawn.Process(target=made_together, args=(tmp_path, start)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(120)
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    assert load(tmp_path / "llama" / "model.safetensors")


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.make("llama", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_says_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"tiny:lama is not a tiny model; there are llama, .*tiny:all"):
        checkpoint.make("lama")


def test_the_cache_is_keyed_by_its_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = checkpoint.cache()
    assert here.parent == tmp_path / "norm_plugin" / "tiny"
    changed = tmp_path / "tiny.py"
    changed.write_bytes(Path(checkpoint.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(checkpoint, "__file__", str(changed))
    assert checkpoint.cache() != here
