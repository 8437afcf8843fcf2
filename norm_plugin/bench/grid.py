"""The sizes that are measured: decode, L2-cold decode, large, small rows, quantised outputs, training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PARTS = ("decode", "cold", "large", "small", "quant", "backward", "host")

DECODE_ROWS = (1, 4, 16, 64, 128, 256)
DECODE_WIDTHS = (1024, 2048, 2880, 4096, 5120, 5376, 7168, 8192, 12288, 16384, 18432)
DECODE_OPS = ("rms", "add", "gemma", "layer", "gated")
GEMMA_WIDTHS = (2048, 5376)
COLD_ROWS = (16, 64, 256)
COLD_WIDTHS = (2048, 4096, 7168, 8192, 16384)
LARGE_WIDTHS = (1024, 2048, 2880, 4096, 5120, 7168, 8192, 16384, 32768, 65536, 131072)
LARGE_BYTES = (64 << 20, 256 << 20)
TOKENS = (1, 64, 2048, 8192)
GROUPS = ((4096, 512), (8192, 1024), (10240, 1280))
LARGE_GROUP = 512
QKV_HEADS = (32, 8)
QUANT_ROWS = (1, 64, 2048, 16384)
QUANT_WIDTHS = (4096, 7168, 8192)
QUANT_OPS = ("static_quant", "static_quant_add", "token_quant", "block_quant")

BACKWARD_OPS = ("rms_backward", "add_backward", "layer_backward", "gated_backward")
BACKWARD_ROWS = (4096, 8192, 16384, 32768)
BACKWARD_WIDTHS = (1024, 2048, 4096, 8192, 16384)
BACKWARD_WIDE = (32768, 65536)
COMPILED_BACKWARD_ROWS = 8192

#: How often an op moves a row through memory, in passes of two bytes an element.
PASSES = {
    "rms": 2, "add": 4, "gemma": 2, "gemma_add": 4, "layer": 2, "gated": 3, "gate_first": 3, "groups": 3, "qk": 2,
    "l2": 2,
    "static_quant": 1.5, "static_quant_add": 3.5, "token_quant": 1.5, "block_quant": 1.5,
    "rms_backward": 5, "add_backward": 8, "layer_backward": 5, "gated_backward": 8,
}  # fmt: skip
ITEMSIZE = 2

#: What the buffers of a decode size take together: they stay in the L2, where in a model the kernel before put them.
WARM_BYTES = 16 << 20


def warm_buffers(traffic: int) -> int:
    """How many sets of buffers stay in the L2 together, by the bytes that a call moves."""
    return min(8, max(2, WARM_BYTES // traffic))


#: More than the 50 MB of an H100's L2, written or read between two uses of one buffer.
COLD_BYTES = 128 << 20
MOST_COLD_BUFFERS = 640


@dataclass(frozen=True)
class Point:
    """One op at one size. `group`: columns of a group; `heads`: x is [rows, heads, width] inside a fused qkv."""

    part: str
    op: str
    rows: int
    width: int
    group: int | None = None
    heads: int = 1

    @property
    def traffic(self) -> int:
        """The bytes that must be moved."""
        return int(PASSES[self.op] * self.rows * self.heads * self.width * ITEMSIZE)

    @property
    def label(self) -> str:
        heads = f" x {self.heads} heads" if self.heads > 1 else ""
        group = f" in groups of {self.group}" if self.group else ""
        return f"{self.op} {self.rows}{heads} x {self.width}{group}"


def decode() -> Iterator[Point]:
    for op in DECODE_OPS:
        for width in DECODE_WIDTHS:
            yield from (Point("decode", op, rows, width) for rows in DECODE_ROWS)
    for width in GEMMA_WIDTHS:
        yield from (Point("decode", "gemma_add", rows, width) for rows in DECODE_ROWS)


def cold() -> Iterator[Point]:
    """The decode sizes at which fewer than MOST_COLD_BUFFERS sets of buffers are larger than the L2."""
    for op in DECODE_OPS:
        for width in COLD_WIDTHS:
            for rows in COLD_ROWS:
                point = Point("cold", op, rows, width)
                if COLD_BYTES // point.traffic < MOST_COLD_BUFFERS:
                    yield point


def large() -> Iterator[Point]:
    for op in (*DECODE_OPS, "groups"):
        for width in LARGE_WIDTHS:
            for size in LARGE_BYTES:
                rows = -(-size // (width * ITEMSIZE))
                if op != "groups":
                    yield Point("large", op, rows, width)
                elif width % LARGE_GROUP == 0:
                    yield Point("large", op, rows, width, LARGE_GROUP)


def small() -> Iterator[Point]:
    for tokens in TOKENS:
        yield from (Point("small", "gated", heads * tokens, 128) for heads in (32, 64))
        yield from (Point("small", "qk", tokens, width, None, heads) for width in (64, 128) for heads in QKV_HEADS)
        yield from (Point("small", "groups", tokens, width, group) for width, group in GROUPS)
        yield from (Point("small", "gate_first", tokens, width) for width in (4096, 8192))
        yield Point("small", "l2", 32 * tokens, 128)


def quant() -> Iterator[Point]:
    for op in QUANT_OPS:
        for width in QUANT_WIDTHS:
            yield from (Point("quant", op, rows, width) for rows in QUANT_ROWS)


def backward() -> Iterator[Point]:
    """A forward and its backward; also rows that are longer than a model's, where others become slow."""
    for op in BACKWARD_OPS:
        for width in BACKWARD_WIDTHS:
            yield from (Point("backward", op, rows, width) for rows in BACKWARD_ROWS)
        yield from (Point("backward", op, BACKWARD_ROWS[0], width) for width in BACKWARD_WIDE)


EVERY = {"decode": decode, "cold": cold, "large": large, "small": small, "quant": quant, "backward": backward}


def points(part: str, quick: bool = False) -> list[Point]:
    """The points of a part; `quick` keeps a few of each op. "host" has none: it is not measured by size."""
    if part == "host":
        return []
    every = list(EVERY[part]())
    if not quick:
        return every
    kept: list[Point] = []
    for op in dict.fromkeys(point.op for point in every):
        of_op = [point for point in every if point.op == op]
        kept += [of_op[0], of_op[len(of_op) // 2]] if len(of_op) > 1 else of_op
    return kept


def compiled(point: Point) -> bool:
    """Whether torch.compile takes part. Compiling takes seconds at each point, so it does not at all of them."""
    if point.part in ("decode", "cold"):
        return point.rows == 64 and point.width in (1024, 2048, 4096, 7168, 16384)
    if point.part == "large":
        return point.width in (1024, 4096, 8192, 65536) and point.rows * point.width * ITEMSIZE == LARGE_BYTES[0]
    if point.part == "small":
        tokens = point.rows // 32 if point.op in ("gated", "l2") else point.rows
        return tokens in (64, 2048)
    if point.part == "backward":
        return point.rows == COMPILED_BACKWARD_ROWS and point.width in BACKWARD_WIDTHS
    return point.width == 4096 and point.rows in (64, 16384)


COMPILED_NOTE = (
    "torch.compile (default mode, dynamic=False) only at: decode and cold 64 x 1024, 2048, 4096, 7168, 16384; "
    "large 64 MB at 1024, 4096, 8192, 65536; small 64 and 2048 tokens; quant 64 and 16384 x 4096; "
    "backward 8192 rows up to 16384"
)


def same_kernels(every: list[Point]) -> list[list[Point]]:
    """The points in groups that share compiled kernels: those that differ in their rows only."""
    grouped: dict[tuple[object, ...], list[Point]] = {}
    for point in every:
        grouped.setdefault((point.op, point.width, point.group, point.heads), []).append(point)
    return list(grouped.values())
