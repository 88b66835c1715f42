"""Measure, print, and write the page."""

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import activations
from bench.timing import Row
from worker.scanner import conversion, loading

_SOURCES = (activations.rows,)


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="runs of each candidate (25)")
    parser.add_argument("--threads", type=int, help="PyTorch's threads (as many as cores)")
    parser.add_argument("--model", type=Path, help="a model folder (the bundled SmolLM2)")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = arguments.model or _bundled()
    model = loading.load(folder, loading.published_numerics(folder))
    rows = [row for source in _SOURCES for row in source(model, rounds=arguments.rounds)]
    page = _page(rows, model_name=folder.name, rounds=arguments.rounds)
    print(page)
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page, encoding="utf-8")


def _bundled() -> Path:
    folder = Path(".cache/models/smollm2-135m-instruct")
    if conversion.origin(folder) is None:
        conversion.convert_gguf(conversion.bundled_smollm2(), folder)
    return folder


def _page(rows: Sequence[Row], *, model_name: str, rounds: int) -> str:
    table = "\n".join(
        f"| {row.what} | {row.n_tokens} | {row.seconds * 1e3:.1f} | {row.ratio:.2f} | {_verdict(row)} |"
        for row in rows
    )
    clock = "Processor" if torch.get_num_threads() == 1 else "Wall"
    return f"""# Benchmarks

Written by `python -m bench`. {clock} time, median of {rounds} rounds in which every candidate runs once, after
warm-up; the ratio is to one plain Hugging Face forward (all logits, no cache) of the same prompt in the same
rounds. Model: {model_name}, float32. Machine: {_machine()}; PyTorch {torch.__version__}.

| what | tokens | milliseconds | x plain forward | goal |
|---|---|---|---|---|
{table}
"""


def _verdict(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"≤ {row.goal:.2f}: {'met' if row.ratio <= row.goal else 'missed'}"


def _machine() -> str:
    """Processor and cores, and nothing that names this machine among others."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
