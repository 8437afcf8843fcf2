"""Trains a small transformer twice, with our norms and with torch's, and draws both loss curves.

    python -m benchmarks.training_curve [--steps 200] [--json FILE] [--picture FILE]

The same start, the same batches, bf16 autocast where there is a GPU and fp32 where there is none. What is learnt is the
text of this repository, byte by byte. On a GPU our norms are the Triton kernels, in both directions, or the run fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import records
from norm_plugin import dispatch, settings
from norm_plugin.layers import LayerNorm, RMSNorm

ROOT = Path(__file__).resolve().parents[1]

LENGTH, BATCH, WIDTH, HEADS, LAYERS = 64, 16, 96, 4, 3
RATE = 3e-3


class Added(nn.Module):
    """torch's RMSNorm with the interface of ours: the residual is added first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, 1e-6)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.norm(total), total


class Layer(nn.Module):
    """Attention and a gated feed-forward, each after an add and a norm."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(WIDTH), norm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.norms[0](x, residual)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        x, residual = self.norms[1](x, residual)
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up), residual


class Model(nn.Module):
    """Bytes to logits of the next byte; LayerNorm at the end, so that both kinds are trained."""

    def __init__(self, norm: Callable[[int], nn.Module], last: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList([Layer(norm) for _ in range(LAYERS)])
        self.last, self.head = last(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x, residual = self.bytes(text), self.places.weight.expand(len(text), -1, -1)
        for layer in self.layers:
            x, residual = layer(x, residual)
        logits: Tensor = self.head(self.last(x + residual))
        return logits


def text() -> Tensor:
    """All Python files of the package, in the order of their names."""
    files = sorted((ROOT / "norm_plugin").rglob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def train(ours: bool, steps: int, device: torch.device) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model = Model(RMSNorm if ours else Added, LayerNorm if ours else nn.LayerNorm).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    data, generator, losses = text(), torch.Generator().manual_seed(1), []
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[start : start + LENGTH + 1] for start in starts]).to(device, torch.long)
        cast: AbstractContextManager[object] = nullcontext()
        if device.type == "cuda":
            cast = torch.autocast("cuda", torch.bfloat16)
        with cast:
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def draw(curves: dict[str, list[float]], title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1))
    for (name, losses), style in zip(curves.items(), ((3, 0.4), (1, 1.0)), strict=True):
        above.plot(losses, label=name, lw=style[0], alpha=style[1])
    above.set_ylabel("loss")
    above.set_title(title, fontsize=10)
    above.legend()
    first, second = curves.values()
    below.plot([a - b for a, b in zip(first, second, strict=True)], lw=1, color="black")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    backend = "triton" if on_gpu else "native"
    with settings.override(backend=backend, strict=True, compile=False):
        curves = {"torch.nn": train(False, options.steps, device)}
        curves["norm_plugin"] = train(True, options.steps, device)
        calls = {f"{route.op.name} ({route.backend})": dispatch.calls(route.op.name) for route in dispatch.routes()}
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    where = torch.cuda.get_device_name() if on_gpu else "a CPU"
    print(f"{where}, {backend}: last losses {', '.join(f'{k} {v[-1]:.4f}' for k, v in curves.items())}")
    print(f"apart: {sum(apart) / len(apart):.2g} in the mean, {max(apart):.2g} at most; calls: {calls}")
    if options.json:
        losses = [{"norms": name, "losses": losses} for name, losses in curves.items()]
        records.write(options.json, losses, backend=backend, calls=calls)
    if options.picture:
        draw(curves, f"{LAYERS} layers of {WIDTH}, {options.steps} steps, {where}", options.picture)


if __name__ == "__main__":
    main()
