"""How faithful circuits are that the estimates and the exact effects name.

    python -m bench.fidelity [FOLDER]

For indirect-object sentences (bench/data), two questions:

* Do the cheap estimates find what exact ablation finds? Rank correlation, and how many of the exact ten
  strongest components are among the thirty that `fast` would measure.
* Does a circuit of the highest-ranked components do the model's work? As in the Mechanistic Interpretability
  Benchmark (Mueller et al. 2025): components are ranked by |mean effect| over training sentences; on held-out
  ones everything outside the first k % is replaced by its value in the corrupt run; faithfulness is the share
  of the clean-corrupt gap that is left. CPR is the area under it over k, CMD that between it and 1.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bench import bundled
from neural_mri.contract.components import Component, Kind
from worker.scanner.attribution import StraightPath, differentiate, estimates, slope
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel, load, published_numerics
from worker.scanner.metrics import Metric
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run, record
from worker.scanner.sweep import sweep

DATA = Path(__file__).parent / "data" / "indirect_object.csv"
N_TRAINING = 24
SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = ("exact", "attribution patching", "integrated gradients", "random")


class Sentence(NamedTuple):
    """A clean and a corrupt prompt of equal length, and what is asked."""

    clean: Tensor
    corrupt: Tensor
    metric: Metric


def sentences(tokenizer: Tokenizer, corruption: str) -> list[Sentence]:
    """The sentences, corrupted by a third name (`corrupted`) or by the other one (`swapped`)."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    with DATA.open() as lines:
        return [
            Sentence(
                torch.tensor([ids(row["clean"])]),
                torch.tensor([ids(row[corruption])]),
                Metric(ids(" " + row["answer"])[0], ids(" " + row["foil"])[0]),
            )
            for row in csv.DictReader(lines)
        ]


def components(model: LoadedModel) -> list[Component]:
    """Heads and MLPs."""
    return [node for node in model.architecture.nodes() if node.kind in (Kind.HEAD, Kind.MLP)]


def scores(model: LoadedModel, sentence: Sentence) -> dict[str, Tensor]:
    """Each method's effects on one sentence."""
    nodes = components(model)
    metric = sentence.metric
    at_clean = differentiate(model, sentence.clean, lambda logits: slope(metric, logits).sum())
    corrupt = record(model, sentence.corrupt)
    replaced = Replacements.resample(corrupt, at_clean.run, model.architecture, start=1)
    path = StraightPath(model, sentence.clean, sentence.corrupt, metric, steps=5)
    return {
        "exact": sweep(model, at_clean.run, nodes, replaced, metric, Silent()).effects,
        "attribution patching": estimates(nodes, at_clean.run, replaced, [at_clean]),
        "integrated gradients": estimates(nodes, at_clean.run, replaced, path),
        "random": torch.rand(len(nodes)),
    }


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def recall(
    first_mlp: int, estimate: Tensor, exact: Tensor, *, shortlist: int = 30, top: int = 10
) -> float:
    """Share of the exact strongest that `fast` would measure: the shortlist, and the first MLP."""
    found, wanted = (
        set(values.abs().topk(count).indices.tolist())
        for values, count in ((estimate, shortlist), (exact, top))
    )
    return len((found | {first_mlp}) & wanted) / top


@contextmanager
def only_circuits(model: LoadedModel, corrupt: Run, keep: Tensor) -> Iterator[None]:
    """In row r of the next forward, components outside `keep[r]` have the corrupt run's values."""
    shape = model.architecture
    by_layer = keep.view(len(keep), shape.n_layers, shape.n_heads + 1)
    handles: list[Any] = []

    def heads_of(layer: int) -> Any:
        kept = by_layer[:, layer, :-1, None].expand(-1, -1, shape.d_head).flatten(1).unsqueeze(1)

        def edit(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.where(kept, args[0], corrupt.z[layer]), *args[1:])

        return edit

    def mlp_of(layer: int) -> Any:
        kept = by_layer[:, layer, -1:, None]

        def edit(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return torch.where(kept, output, corrupt.mlp[layer])

        return edit

    try:
        for layer, block in enumerate(model.modules.blocks):
            handles.append(block.w_o.register_forward_pre_hook(heads_of(layer)))
            handles.append(block.mlp_write.register_forward_hook(mlp_of(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def circuit_metrics(model: LoadedModel, sentence: Sentence, ranking: Tensor) -> Tensor:
    """The metric of the circuit of each share of the components, and of the clean and corrupt runs."""
    keep = torch.zeros(len(SHARES), len(ranking), dtype=torch.bool)
    for row, share in enumerate(SHARES):
        keep[row, ranking[: round(share * len(ranking))]] = True
    corrupt = record(model, sentence.corrupt)
    ids = sentence.clean.expand(len(SHARES), -1)
    with only_circuits(model, corrupt, keep):
        logits = model.plain(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    clean = record(model, sentence.clean)
    return torch.cat([sentence.metric(run) for run in (logits, clean.logits, corrupt.logits)])


def areas(faithfulness: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD."""
    shares, values = torch.tensor(SHARES), torch.tensor(faithfulness)
    cpr = torch.trapezoid(values, shares).item()
    return cpr, torch.trapezoid((1 - values).abs(), shares).item()


def markdown(model: LoadedModel, folder: Path) -> str:
    """A table for each of the two corruptions."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tables = (_table(model, tokenizer, name) for name in ("corrupted", "swapped"))
    return "\n\n".join(("### Circuits of indirect objects", *tables)) + "\n"


def _table(model: LoadedModel, tokenizer: Tokenizer, corruption: str) -> str:
    every = sentences(tokenizer, corruption)
    training, held_out = every[:N_TRAINING], every[N_TRAINING:]
    with torch.no_grad():
        found = [scores(model, sentence) for sentence in training]
    first_mlp = components(model).index(Component(Kind.MLP, 0))
    lines = [
        f"{corruption}: {len(training)} sentences to rank by, {len(held_out)} held out",
        "",
        "| method | Spearman | recall@30 | CPR | CMD | faithfulness at 5 % | 10 % | 20 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        spearman, recalled = (
            sum(compare(one[method], one["exact"]) for one in found) / len(found)
            for compare in (rank_correlation, partial(recall, first_mlp))
        )
        mean = torch.stack([one[method] for one in found]).mean(0)
        ranking = mean.abs().argsort(descending=True)
        with torch.inference_mode():
            measured = [circuit_metrics(model, sentence, ranking) for sentence in held_out]
        *circuits, clean, corrupt = torch.stack(measured).mean(0).tolist()
        faithful = [(value - corrupt) / (clean - corrupt) for value in circuits]
        cpr, cmd = areas(faithful)
        some = " | ".join(f"{faithful[SHARES.index(share)]:.2f}" for share in (0.05, 0.1, 0.2))
        lines.append(
            f"| {method} | {spearman:.2f} | {recalled:.3f} | {cpr:.3f} | {cmd:.3f} | {some} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the two tables."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else bundled.folder()
    model = load(folder, published_numerics(folder))
    print(markdown(model, folder))


if __name__ == "__main__":
    main()
