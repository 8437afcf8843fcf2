"""Writes docs/engines_on_h100.md from the runs in scripts/results: `python -m benchmarks.engine_tables`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from norm_plugin.bench.tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "scripts/results/{}-h100-2026-11-21.json"
PAGE = ROOT / "docs" / "engines_on_h100.md"

HEAD = """# Both engines on an H100

`benchmarks/engine_tables.py` made this page from [{vllm}](../{vllm}) and [{sglang}](../{sglang}), which have dates,
versions and commits: torch {torch}, Triton {triton}, vLLM {vllm_version}, SGLang {sglang_version}, {gpu}. Stock and
patched are the same model with the same weights in two processes. `benchmarks/same_output.py`, `deterministic.py` and
`speed.py` measure again. They compare as `norm-plugin verify` does: the best five tokens at each position of an answer.
The runs on this page compared the chosen tokens, and the tokens of the prompts.

Two outputs count as the same if patched is no further from stock than stock is from itself, with the requests in
another order and one by one. Δ is the difference of logprobs; its mean is over the positions that differ at all
([why](numerics.md#what-verify-compares)). The floor is the larger Δ of the two orders. Patched may have 2 times its
maximum and 1.5 times its mean.
"""


MODES = {
    ("eager", "eager"): "--enforce-eager",
    ("compiled", "eager"): "default",
    ("compiled", "all"): "default, NORM_PLUGIN_SCOPE=all",
}


def load(engine: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / RESULTS.format(engine)).read_text())
    return found


def delta(largest: float, mean: float) -> str:
    return f"{largest:.2g} / {mean:.2g}" if largest else "0"


def worst(found: Iterable[dict[str, Any]], *names: str) -> list[float]:
    """The largest of each number over all of them."""
    every = list(found)
    return [max(one[name] for one in every) for name in names]


def several(calls: dict[str, int]) -> str:
    """The ops of ours that ran, and what was not ours."""
    ran = {name.split()[-1] for name, number in calls.items() if number}
    return ", ".join(sorted(ran)) or "none: Inductor's"


def vllm_same(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in sorted(results, key=lambda r: (r["family"], MODES[r["mode"], r["scope"]])):
        numbers = [worst([r["ours"]], f"{w}_max", f"{w}_mean") for w in ("prompt", "decoded")]
        floors = [worst(r["noise"].values(), f"{w}_max", f"{w}_mean") for w in ("prompt", "decoded")]
        pairs = [f"{delta(*mine)}, {delta(*floor)}" for mine, floor in zip(numbers, floors, strict=True)]
        ours = several(r["calls"]) if r["family"] != "gpt2" else "none: nn.LayerNorm"
        mode = MODES[r["mode"], r["scope"]]
        rows.append([r["family"], mode, ours, *pairs, "yes" if r["within_noise"] else "no"])
    head = ["model", "mode", "ours", "prompts: Δ max / mean of ours, of the floor", "answers", "inside"]
    return table(head, rows)


def vllm_speed(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in (r for r in results if "superseded" not in r):
        for batch, b in r["batches"].items():
            stock, ours = (statistics.median(b[f"{side}_tokens_per_s"]) for side in ("stock", "patched"))
            spread = f"{min(b['ratios']):.2f} to {max(b['ratios']):.2f}"
            what = [r["family"], str(r["layers"]), MODES[r["mode"], r["scope"]], batch]
            rows.append([*what, f"{stock:.0f}", f"{ours:.0f}", f"{b['ratio']:.3f}", spread, r["measure"]])
    head = ["model", "layers", "mode", "batch", "stock, tokens/s", "patched", "ratio", "of the repeats", "measured as"]
    return table(head, rows)


def encoder(found: dict[str, Any]) -> str:
    rows = [
        [patches, f"{r['ms']['stock']:.2f}", f"{r['ms']['patched']:.2f}", f"{r['ratio']:.1f}"]
        for patches, r in found["patches"].items()
    ]
    return table(["patches", "stock, ms", "patched, ms", "ratio"], rows)


def sglang_same(found: list[dict[str, Any]]) -> str:
    rows = []
    for r in found:
        floor = worst(r["floor"].values(), "max_dlogprob", "mean_dlogprob")
        mine = worst(r["patched"].values(), "max_dlogprob", "mean_dlogprob")
        ran = ", ".join(sorted({c.split(":")[0] for c in r["calls"] if "not ours" not in c})) or "none: nn.LayerNorm"
        same = r["patched"]["given"]["same_tokens"]
        inside = "yes" if r["inside_the_floor"] else "no"
        rows.append([r["model"], ran, same, delta(*mine), delta(*floor), inside])
    return table(["model", "ours", "same answers", "Δ max / mean of ours", "of the floor", "inside"], rows)


def sglang_deterministic(found: list[dict[str, Any]]) -> str:
    rows = []
    for r in found:
        with_stock = r["patched_and_stock"]
        apart = delta(with_stock["max_dlogprob"], with_stock["mean_dlogprob"])
        equal = [name for name, same in r["patched_bitwise"].items() if same]
        rows.append([r["model"], ", ".join(equal), with_stock["same_tokens"], apart])
    return table(["model", "patched has the same bits", "same answers as stock", "Δ max / mean from stock"], rows)


def sglang_speed(found: dict[str, Any]) -> str:
    rows = []
    for batch, stock in found["measured"]["stock"]["decode"].items():
        ours = found["measured"]["patched"]["decode"][batch]
        shown = [" ".join(f"{x:.0f}" for x in side) for side in (stock, ours)]
        rows.append([batch, *shown, f"{statistics.median(ours) / statistics.median(stock):.3f}"])
    return table(["batch", "stock, tokens/s", "patched", "ratio of medians"], rows)


def sglang_prefill(runs: list[dict[str, Any]]) -> str:
    rows = []
    for of in runs:
        for prompts, stock in of["measured"]["stock"]["prefill"].items():
            ours = of["measured"]["patched"]["prefill"][prompts]
            shown = [" ".join(f"{x:.1f}" for x in side) for side in (stock, ours)]
            ratio = statistics.median(stock) / statistics.median(ours)
            rows.append([prompts, str(of.get("processes", 1)), *shown, f"{ratio:.3f}"])
    return table(["prompts x tokens", "processes a side", "stock, ms", "patched", "ratio of medians"], rows)


def sglang_kernel(found: dict[str, Any]) -> str:
    rows = [
        [str(r["tokens"]), r["activation"], f"{r['sglang_us']:.2f}", f"{r['ours_us']:.2f}", f"{r['ratio']:.2f}",
         str(r["largest_difference_in_ulps"])]
        for r in found["rows"]
    ]  # fmt: skip
    return table(["tokens", "gate", "SGLang's, us", "ours", "ratio", "largest difference, bf16 ulps"], rows)


def page() -> str:
    vllm, sglang = load("vllm"), load("sglang")
    of = {
        part: [r for r in vllm["results"] if r["part"] == part and r.get("calls") is not None]
        for part in ("same", "speed", "encoder")
    }
    head = HEAD.format(
        vllm=RESULTS.format("vllm"), sglang=RESULTS.format("sglang"), torch=vllm["torch"], triton=vllm["triton"],
        vllm_version=vllm["vllm"], sglang_version=sglang["sglang"], gpu=vllm["gpu"],
    )  # fmt: skip
    missing = "; ".join(f"{name}: {why}" for name, why in sglang["not_run"].items())
    parts = [
        head,
        "## vLLM: the same output\n",
        f"Published widths, 8 layers, random weights, 16 prompts. Not run: {vllm['not_run']}. In the default mode the "
        "code that Inductor generates with and without us is the same, file by file (compared on a CPU, vLLM 0.32.0). "
        "But each process compiles and tunes it for itself, and a sum in another order is enough to differ.\n",
        vllm_same(of["same"]),
        "\n## vLLM: decoding\n",
        "In the default mode, compiled code stays Inductor's, so a ratio shows the noise of the measurement: each "
        "process tunes its own code, and one stock process differs from another by 2 %. Earlier, two pairs of single "
        "processes had 0.974 and 0.978 (Mamba2 with groups), 0.997 and 0.981 (Qwen3-Next), at batch 1 and 32.\n",
        vllm_speed(of["speed"]),
        "\n## vLLM: the norms of a qwen2.5-vl vision encoder, 32 blocks of 1280 columns\n",
        encoder(of["encoder"][0]),
        "\n## SGLang: the same output\n",
        f"Wide tiny models, CUDA graphs, 8 or 24 prompts. Not run: {missing}.\n",
        sglang_same(sglang["equal"]),
        "\n" + "\n".join(sglang["notes"]),
        "\n## SGLang, deterministic (--enable-deterministic-inference): the same bits\n",
        sglang_deterministic(sglang["deterministic"]["models"]),
        f"\n## SGLang, deterministic: decoding, {sglang['speed_deterministic']['model']}, 28 layers\n",
        sglang_speed(sglang["speed_deterministic"]),
        f"\n## SGLang, default mode: decoding, {sglang['speed']['model']}, 28 layers\n",
        sglang_speed(sglang["speed"]),
        "\nAgain, two processes a side:\n",
        sglang_speed(sglang["speed_two_processes"]),
        "\nEach number is the fastest of four shots. A shot is the time of a long answer minus that of a short one, so "
        "it looks fast if the short one took too long. The numbers of 1756 to 2182 at batch 1 are such shots, so the "
        "second ratio at batch 1 says nothing. `benchmarks/speed.py` now takes the fastest long and the fastest short "
        "answer.",
        "\n## SGLang, default mode without its CUDA graphs of prefill: time to the first token\n",
        sglang_prefill([sglang["speed"], sglang["speed_two_processes"]]),
        "\nHere the GPU waits for the host, which launches each kernel. A call of SGLang's RMSNorm with a residual "
        "took the host 9.9 us without us, 12.4 us with ours, and 13.4 us with a report, as here (measured alone, with "
        "everything in caches). Since then the hook no longer asks layers for an attribute that they lack in this "
        "SGLang, which took 1.8 us of a call on a busy CPU; the change has not been timed here.",
        "\n## SGLang's fused_norm_gate, 32 heads of 128\n",
        sglang_kernel(sglang["kernel"]),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
