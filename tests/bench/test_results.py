"""What is made of the numbers: merging, the summary, the tables, the pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from norm_plugin.bench import results, summary, tables
from norm_plugin.bench.grid import Point
from norm_plugin.bench.peers import ALONE_NAME, OUR_NAME
from tests.bench.samples import entry, sample


def medians(**found: float) -> dict[str, Any]:
    return {name: {"median": time, "spread": 0.0, "rounds": [time]} for name, time in found.items()}


def made(part: str, op: str, rows: int, width: int, found: dict[str, Any]) -> dict[str, Any]:
    return entry(Point(part, op, rows, width), found)


def run_of(part: str, *points: dict[str, Any], **more: Any) -> results.Results:
    return {**results.empty(), "runs": {part: {"date": "now"}}, "points": list(points), **more}


def test_merging_keeps_other_points_and_takes_the_new_ones() -> None:
    old = run_of("decode", made("decode", "rms", 1, 1024, medians(a=1)), made("decode", "rms", 4, 1024, medians(a=1)))
    new = run_of("decode", made("decode", "rms", 1, 1024, medians(a=2)), host=[{"call": "rmsnorm", "times": {}}])
    both = results.merged(old, new)
    assert [(p["rows"], p["times"]["a"]["median"]) for p in both["points"]] == [(1, 2), (4, 1)]
    assert both["host"] == new["host"]
    assert results.merged(both, run_of("large"))["host"] == new["host"]


def test_merging_forgets_what_has_been_measured_since() -> None:
    point = made("decode", "rms", 1, 1024, medians(a=1))
    waiting = [{"part": "decode", "label": label} for label in (point["label"], "rms 2 x 1024")]
    absent = {"part": "decode", "peer": "Quack", "where": "", "reason": "no such module"}
    elsewhere = {"part": "large", "peer": "Quack", "where": "", "reason": "no such module"}
    old = run_of("decode", not_measured=waiting, left_out=[absent, elsewhere])
    both = results.merged(old, run_of("decode", point))
    assert both["not_measured"] == waiting[1:]
    assert both["left_out"] == [elsewhere]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    results.save(path, sample())
    assert results.load(path) == sample()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("point", "missed"),
    [
        (made("decode", "rms", 1, 1024, medians(norm_plugin=1.02, a=1.0, b=2.0)), []),
        (made("decode", "rms", 1, 1024, medians(norm_plugin=1.03, a=1.0, b=2.0)), ["1.030 of a"]),
        (made("decode", "rms", 1, 1024, medians(a=1.0)), ["ours did not run"]),
        ({**made("large", "rms", 32768, 1024, medians(norm_plugin=100.0)), "copy_us": 97.1}, []),
        ({**made("large", "rms", 32768, 1024, medians(norm_plugin=100.0)), "copy_us": 96.0}, ["96.0% of copy"]),
        ({**made("large", "rms", 512, 65536, medians(norm_plugin=60.0)), "copy_us": 60.0}, ["2.24 TB/s"]),
        (
            made("quant", "token_quant", 2048, 4096, {**medians(norm_plugin=1.06, a=2.0), ALONE_NAME: {"median": 1}}),
            ["1.060 of the norm alone"],
        ),
        (
            made("quant", "token_quant", 64, 4096, {**medians(norm_plugin=1.06, a=2.0), ALONE_NAME: {"median": 1}}),
            [],
        ),
    ],
)
def test_the_bars(point: dict[str, Any], missed: list[str]) -> None:
    assert summary.failures(point) == missed


def test_the_worst_point_of_an_op_comes_first() -> None:
    points = [made("decode", "rms", rows, 1024, medians(norm_plugin=rows, a=4)) for rows in (1, 16, 4)]
    lines = summary.op_lines("decode", "rms", points)
    assert lines[0].startswith("decode rms: 1 of 3 points miss a bar; geometric mean 1.000")
    assert [line.split()[1] for line in lines[1:]] == ["16", "4", "1"]


def test_the_norm_alone_is_no_peer() -> None:
    point = made("quant", "token_quant", 1, 4096, {**medians(norm_plugin=2.0), ALONE_NAME: {"median": 1.0}})
    assert summary.against(point) is None
    assert summary.over_alone(point) == 2.0


def test_the_summary_says_who_is_missing_and_what_is_wrong() -> None:
    found = sample()
    found["left_out"] = [{"part": part, "peer": "Quack", "where": "", "reason": "gone"} for part in ("decode", "large")]
    found["host"][0]["times"][OUR_NAME]["median"] = 9.0
    found["memory"][0]["allocated"] += 512
    text = "\n".join(summary.lines(found))
    assert "Quack (everywhere): gone" in text
    assert "MISSES: more than FlashInfer's" in text
    assert "MISSES: 524800 bytes for an output of 524288" in text


def test_tables_have_cells_for_everything() -> None:
    found = sample()
    point = next(p for p in found["points"] if p["part"] == "decode" and p["width"] == 4096 and p["rows"] == 1)
    del point["times"]["Liger"]
    text = tables.markdown(found)
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1, lines[0]
    assert "nan" not in text
    assert "| decode, rms | 66 |" in text


def test_tables_of_an_empty_run() -> None:
    assert tables.markdown(results.empty()).startswith("Ours over the fastest peer")


def test_pictures(tmp_path: Path) -> None:
    plots = pytest.importorskip("norm_plugin.bench.plots", reason="matplotlib is not installed")
    found = sample()
    assert [path.name for path in plots.pictures(found, tmp_path)] == ["decode.png", "large.png"]
    assert all(path.stat().st_size > 20_000 for path in tmp_path.iterdir())
    sparse = copy.deepcopy(found)
    sparse["points"] = [p for p in found["points"] if p["part"] == "decode" and p["op"] == "rms" and p["rows"] == 1]
    assert [path.name for path in plots.pictures(sparse, tmp_path / "sparse")] == ["decode.png"]
