"""`python -m bench.cluster`: measure, print, and write the sections of the page.

python -m bench.cluster [--only PART ...] [--page FILE]
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from bench import bundled, page
from bench.bundled import MODEL
from bench.cluster import fairness, overhead, sameness, sharing, streams, throughput
from bench.cluster.figures import Figure, table
from bench.cluster.service import Cluster, prepared, serving
from tests.tiny import save_tiny_model
from worker.scanner import loading
from worker.scanner.loading import LoadedModel

PARTS = ("sharing", "flood", "streams", "throughput", "sameness", "overhead", "shares")
ROUNDS = 2

INTRODUCTION = """`python -m bench.cluster`: whole services (API, worker, reaper, Valkey, SQLite) on this machine, with users who
have keys; the bundled model, one PyTorch thread a worker. Rates are a second of processor time, of all processes
of a service, and what is compared with each other runs in turn: other programs on the machine change little.
Times (milliseconds, job-times, delays) are wall time, and grow with whatever else runs.
"""


def main() -> None:
    """Run the parts, each of which prints its table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (all)"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Figure] = []
    for figures in _measured(arguments.only):
        print(table(figures), flush=True)
        found += figures
    if tuple(arguments.only) == PARTS:
        page.replace_section(arguments.page, "Cluster", f"{INTRODUCTION}\n{table(found)}")
    if "overhead" in arguments.only:
        with _of_a_tiny_model() as cluster:
            price = table(overhead.figures(cluster))
        print(price, flush=True)
        page.replace_section(arguments.page, overhead.TITLE, f"{overhead.INTRODUCTION}\n{price}")


def _measured(parts: Sequence[str]) -> Iterator[list[Figure]]:
    of_service: dict[str, Callable[[Cluster], list[Figure]]] = {
        "sharing": sharing.figures,
        "flood": fairness.flood,
        "streams": streams.figures,
    }
    with ExitStack() as running:
        if {*of_service, "throughput"} & {*parts}:
            settings = running.enter_context(prepared(MODEL, bundled.folder(), threads=1))
            cluster = running.enter_context(serving(settings))
            for name, figures in of_service.items():
                if name in parts:
                    yield figures(cluster)
            if "throughput" in parts:
                other = running.enter_context(
                    prepared(MODEL, bundled.folder(), threads=1, batch_jobs=1)
                )
                alone = running.enter_context(serving(other))
                model = _model()
                yield throughput.figures(cluster, alone, model, rounds=ROUNDS)
                yield list(throughput.of_each_kind(cluster, alone, model, rounds=ROUNDS))
    if "sameness" in parts:
        yield sameness.figures(_model())
    if "shares" in parts:
        with _of_a_tiny_model() as cluster:
            yield fairness.shares(cluster)


def _model() -> LoadedModel:
    folder = bundled.folder()
    return loading.load(folder, loading.published_numerics(folder))


@contextmanager
def _of_a_tiny_model() -> Iterator[Cluster]:
    """What is about the queue alone: a model of three layers, so that there is little else."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = save_tiny_model(Path(folder) / "tiny")
        with prepared("tiny", tiny, threads=1) as settings, serving(settings) as cluster:
            yield cluster


if __name__ == "__main__":
    main()
