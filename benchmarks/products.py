"""How fast products of few rows read their weights: the library's beside a kernel made for them.

    python -m benchmarks.products --shape llama-3.1-8b --output benchmarks/results/products-llama-3.1-8b.json

A cycle of decoding multiplies a window's nodes (11 or 61 rows) by every weight of the target and single rows by the
drafter's, so its floor is the reading of weights. For each matrix, as the fast path lays them out, this measures bytes
of weights per second through ``torch.nn.functional.linear`` and through ``few_rows``, a Triton kernel that streams the
weights once, in the best of its tilings; every product reads weights that no cache holds. The sums say what a
verification and a draft step would gain from the kernel, before it becomes part of either. On a CPU the library is
measured beside the other order of the factors, which decoding takes where it is faster (:mod:`ppow.products_ppow`).

    python -m benchmarks.products --shape smollm2-135m --nodes 1,2,4,8 --threads 2
"""

import argparse
import functools
import itertools

import torch
from torch.nn.functional import linear

from ppow.products_ppow import swapped

from .machine import copy_speed, recorded, seconds_of
from .pairs import SHAPES
from .report import add_output, facts, save

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

SHARED_MEMORY = 220 * 1024  # bytes that a block of an H100 or H200 may take, with a little to spare


def main(argv=None) -> dict:
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = facts("products", arguments, argv, device=device, dtype=str(dtype).split(".")[-1]) | {
        "copy_bytes_per_second": copy_speed(device) if device == "cuda" else None,
        "products": [],
    }
    computed = parts(arguments)
    for part, (matrices, rows) in computed.items():
        for name, (columns, inner, times) in matrices.items():
            row = {"part": part, "matrix": name, "rows": rows, "columns": columns, "inner": inner, "times": times}
            row |= measure(rows, columns, inner, device, dtype, arguments.repeats)
            report["products"].append(row)
            print(line(row), flush=True)
    report["milliseconds"] = {part: total(report, part) for part in computed}
    for part, sums in report["milliseconds"].items():
        print(f"{part}: " + ", ".join(f"{way} {value:.3f} ms" for way, value in sums.items()))
    save(report, arguments.output)
    return report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--nodes", default="11,61", help="comma separated sizes of the verified windows")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, help="CPU threads of torch; none: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    return parser.parse_args(argv)


def parts(arguments) -> dict:
    """What is computed -> ({matrix: (columns, inner, how often)}, rows): verifications, and a draft step."""
    _, shape, draft_vocabulary = SHAPES[arguments.shape]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    attention = queries + 2 * shape["num_key_value_heads"] * shape["head_dim"]  # q, k and v side by side

    def model(width: int, count: int, vocabulary: int) -> dict:
        return {
            "q/k/v": (attention, width, count),
            "o": (hidden, queries, count),
            "gate/up": (2 * inner, hidden, count),
            "down": (hidden, inner, count),
            "head": (vocabulary, hidden, 1),
        }

    target = model(hidden, layers, shape["vocab_size"])
    found = {f"verification of {nodes} nodes": (target, int(nodes)) for nodes in arguments.nodes.split(",")}
    return found | {"draft step": (model(2 * hidden, 1, draft_vocabulary), 1)}  # embedding and features side by side


def measure(rows: int, columns: int, inner: int, device: str, dtype: torch.dtype, repeats: int) -> dict:
    """Microseconds of one product by the library and by the best tiling of ``few_rows``; how far the two differ."""
    size = columns * inner * dtype.itemsize
    count = max(2, -(-200_000_000 // size))  # together more than a cache holds
    weights = [torch.randn(columns, inner, device=device, dtype=dtype) * inner**-0.5 for _ in range(count)]
    x = torch.randn(rows, inner, device=device, dtype=dtype)

    def microseconds(product, repeats: int) -> float:
        def work():
            return [product(x, weight) for weight in weights]

        return 1e6 * seconds_of(recorded(work) if device == "cuda" else work, repeats) / count

    row = {"bytes": size, "library_us": microseconds(linear, repeats)}
    if device == "cpu":
        return row | {"kernel_us": microseconds(swapped, repeats), "tiling": "W x^T"}
    if triton is None:
        return row
    expected, found = linear(x.float(), weights[0].float()), {}
    for tiling in tilings(rows):
        error = float((few_rows(x, weights[0], tiling).float() - expected).norm() / expected.norm())
        if not error < 0.01:
            raise ValueError(f"few_rows with {tiling} is off by {error:.3g} at {rows} x {columns} x {inner}.")
        found[tiling] = microseconds(functools.partial(few_rows, tiling=tiling), max(3, repeats // 4))
    best = min(found, key=found.get)
    return row | {"kernel_us": microseconds(functools.partial(few_rows, tiling=best), repeats), "tiling": best}


def total(report: dict, part: str) -> dict:
    """Milliseconds of all products of a part, by the library and, where it was measured, by the better of the two."""
    rows = [row for row in report["products"] if row["part"] == part]
    sums = {"library": sum(row["times"] * row["library_us"] for row in rows) / 1000}
    if all("kernel_us" in row for row in rows):
        better = (row["times"] * min(row["library_us"], row["kernel_us"]) for row in rows)
        sums["kernel where it is faster"] = sum(better) / 1000
    return sums


def line(row: dict) -> str:
    """One product: bytes of weights per second each way."""
    text = f"{row['part']:26s} {row['matrix']:8s} {row['columns']:6d} x {row['inner']:5d}"
    text += f"  library {row['library_us']:8.1f} us {row['bytes'] / row['library_us'] / 1e6:6.2f} TB/s"
    if "kernel_us" in row:
        text += f"  kernel {row['kernel_us']:8.1f} us {row['bytes'] / row['kernel_us'] / 1e6:6.2f} TB/s {row['tiling']}"
    return text


# -- the kernel --------------------------------------------------------------------------------------------------------


def tilings(rows: int) -> list[tuple]:
    """Columns and depth of a tile, parts the depth is split into, warps, stages in flight; those that fit."""
    choices = itertools.product((32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (3, 5))
    return [
        (columns, depth, splits, 4 if columns < 128 else 8, stages)
        for columns, depth, splits, stages in choices
        if (columns + max(16, rows)) * depth * 2 * stages <= SHARED_MEMORY
    ]


def few_rows(x: torch.Tensor, weight: torch.Tensor, tiling: tuple) -> torch.Tensor:
    """x (M, K) times weight (N, K) transposed, M at most 64: -> (M, N) in x's dtype, summed in float32.

    Args:
        tiling: an entry of :func:`tilings`.
    """
    columns, depth, splits, warps, stages = tiling
    (rows, inner), width = x.shape, weight.shape[0]
    out = x.new_empty(rows, width)
    whole = splits == 1
    sums = out if whole else x.new_empty(splits, rows, width, dtype=torch.float32)
    exact = x.dtype == torch.float32
    _stream_weights[(triton.cdiv(width, columns), splits)](
        x, weight, sums, rows, width, inner, x.stride(0), weight.stride(0), rows * width,
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=columns, DEPTH=depth, SPLITS=splits, EXACT=exact,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not whole:
        _add_parts[(triton.cdiv(rows * width, 1024),)](sums, out, rows * width, SPLITS=splits, BLOCK=1024)
    return out


if triton is not None:

    @triton.jit
    def _stream_weights(
        x, weight, sums, rows, width, inner, x_row, w_row, part,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """COLUMNS outputs of all rows, over one split of the depth; the weights stand on the wide side of the dot."""
        block, split = tl.program_id(0), tl.program_id(1)
        column, row = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
        share = tl.cdiv(tl.cdiv(inner, DEPTH), SPLITS) * DEPTH
        start = split * share
        real_column, real_row = column < width, row < rows
        total = tl.zeros([COLUMNS, ROWS], tl.float32)
        for left in range(start, tl.minimum(start + share, inner), DEPTH):
            place = left + tl.arange(0, DEPTH)
            real = place < inner
            at = weight + column[:, None] * w_row + place[None]
            w = tl.load(at, mask=real_column[:, None] & real[None], other=0.0, eviction_policy="evict_first")
            a = tl.load(x + row[None] * x_row + place[:, None], mask=real_row[None] & real[:, None], other=0.0)
            total = tl.dot(w, a, total, input_precision="ieee" if EXACT else "tf32")
        at = sums + split * part + row[None] * width + column[:, None]
        tl.store(at, total.to(sums.dtype.element_ty), mask=real_column[:, None] & real_row[None])

    @triton.jit
    def _add_parts(sums, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        real = place < count
        total = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(sums + split * count + place, mask=real, other=0.0)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=real)


if __name__ == "__main__":
    main()
