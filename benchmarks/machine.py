"""The machine that benchmarks run on: its GPUs, waiting for them, and what they do in a second."""

import argparse
import os
import statistics
import time

import torch


def check_gpus(parser: argparse.ArgumentParser, wanted: int) -> None:
    """Refuse more GPUs than there are; machines without any run everything on the CPU."""
    there = torch.cuda.device_count()
    if wanted < 1 or there and wanted > there:
        parser.error(f"--gpus {wanted}: this machine shows {there}")


def on_gpus(indices) -> dict[str, str]:
    """Variables that show a process some of this process's GPUs only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else None
    return {"CUDA_VISIBLE_DEVICES": ",".join(known[index] if known else str(index) for index in indices)}


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, repeats: int = 20) -> float:
    """Median seconds of a call, behind one that does not count."""
    function()
    device, times = "cuda" if torch.cuda.is_available() else "cpu", []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def recorded(function):
    """Replays ``function`` from a CUDA graph, so that launching its kernels takes no time."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_speed(device: str) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: sink.copy_(source))


def matmul_speed(device: str, dtype: torch.dtype, nodes: int = 11) -> float:
    """Bytes of weights per second through matrix products with ``nodes`` rows, each weight read for the first time."""
    weights = [torch.randn(14336, 4096, device=device, dtype=dtype) for _ in range(8)]
    rows = torch.randn(nodes, 4096, device=device, dtype=dtype)
    replay = recorded(lambda: [torch.nn.functional.linear(rows, weight) for weight in weights])
    return sum(w.numel() for w in weights) * dtype.itemsize / seconds_of(replay)
