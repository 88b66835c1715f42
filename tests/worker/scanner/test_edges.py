"""Edges on a tiny model of every family, against paths patched with hooks by hand."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neural_mri.contract.circuits import Granularity
from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from tests import models
from tests.worker.scanner.by_hand import ByHand
from worker.scanner import edges as edging
from worker.scanner.attribution import Differentiated, StraightPath, differentiate, estimates, slope
from worker.scanner.edges import Edges, strongest_edges
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.replacements import Replacements
from worker.scanner.runs import record

IDS = torch.tensor([models.prompt(6).ids])
OTHER = torch.tensor([models.prompt(6, seed=4).ids])
METRIC = Metric(5, 9)
ALL = 10_000
SHARED_NORM = ("phi", "gptj", "codegen", "cohere", "stablelm")
OTHERS = (*SHARED_NORM, "olmo", "mpt")
"""And of families that clip queries, keys and values in place, and that ask their cache how long it is."""


def at_clean(model: LoadedModel) -> Differentiated:
    return differentiate(model, IDS, lambda logits: slope(METRIC, logits).sum())


def resampled(model: LoadedModel, clean: Differentiated, start: int = 1) -> Replacements:
    with torch.no_grad():
        other = record(model, OTHER)
    return Replacements.resample(other, clean.run, model.architecture, start=start)


def edges_of(
    model: LoadedModel,
    clean: Differentiated,
    new: Replacements,
    *,
    granularity: Granularity = Granularity.HEADS,
    count: int = ALL,
    path: Any = None,
) -> Edges:
    found = path or [clean]
    return strongest_edges(model, clean.run, found, new, granularity, count, Silent())


def strengths(edges: Edges) -> dict[tuple[Component, Component], float]:
    return {(edge.source, edge.target): edge.strength for edge in edges.strongest}


class _Paths:
    """Path patching by hand: what one component reads changed, and nothing else."""

    def __init__(self, model: LoadedModel, family: str) -> None:
        self._hand = ByHand(model, family)
        self._modules = model.modules
        self.components = self._hand.components()
        self._clean = self._hand.values(IDS, self.components)
        self._shares_norm = family in SHARED_NORM

    def write(self, source: Component, new: Replacements, share: float) -> Tensor:
        """What a share of the replacement changes of the source's write at every position."""
        own = self._clean[source]
        change = torch.zeros_like(own)
        change[new.start :] = share * (new.of(source) - own[new.start :])
        if source.kind is not Kind.HEAD:
            return change
        layer = source.layer or 0
        attn = Component(Kind.ATTN, layer)
        written = []
        for by in (own + change, own):
            with self._hand.replaced(source, by, start=0):
                written.append(self._hand.values(IDS, [attn])[attn])
        return written[0] - written[1]

    def metric(self, target: Component, added: Tensor) -> Tensor:
        """The metric when the target, alone, reads so much more."""
        if target == UNEMBED:
            with self._reads(self._modules.final_norm, added):
                return METRIC(self._hand.logits(IDS))
        block = self._modules.blocks[target.layer or 0]
        if target.kind is Kind.MLP:
            norm, sublayer = block.mlp_norm, block.mlp
        else:
            norm, sublayer = block.attn_norm, block.attn
        if target.kind is Kind.MLP and self._shares_norm:
            reading = self._reads_through(norm, sublayer, added)
        else:
            reading = self._reads(sublayer if isinstance(norm, nn.Identity) else norm, added)
        with reading:
            value = self._hand.values(IDS, [target])[target]
        return METRIC(self._hand.logits_without(IDS, target, value, start=0))

    @contextmanager
    def _reads(self, module: nn.Module, added: Tensor) -> Iterator[None]:
        def add(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if args:
                return (args[0] + added, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

        handle = module.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _reads_through(self, norm: nn.Module, mlp: nn.Module, added: Tensor) -> Iterator[None]:
        """The MLP reads more, and attention does not, where both read what one norm gave."""
        before: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            before.append(args[0])

        def add(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (norm.forward(before[-1] + added), *args[1:])

        with ExitStack() as stack:
            stack.callback(norm.register_forward_pre_hook(keep).remove)
            stack.callback(mlp.register_forward_pre_hook(add).remove)
            yield


def assert_edges_are_slopes_of_paths(model: LoadedModel, family: str) -> None:
    clean = at_clean(model)
    new = resampled(model, clean)
    found = strengths(edges_of(model, clean, new))
    paths, share = _Paths(model, family), 5e-3
    last = model.architecture.n_layers - 1
    sources = [EMBED, Component.head(0, 1), Component(Kind.MLP, 0), Component.head(last, 2)]
    targets = [
        Component.head(1, 0),
        Component.head(last, 1),
        Component(Kind.MLP, 0),
        Component(Kind.MLP, last),
        UNEMBED,
    ]
    pairs = [(source, target) for source in sources for target in targets]
    checked = [pair for pair in pairs if pair in found]
    assert len(checked) >= 12
    largest = max(abs(found[pair]) for pair in checked)
    for source, target in checked:
        forth, back = (
            paths.metric(target, paths.write(source, new, sign * share)) for sign in (1, -1)
        )
        slope_of_path = ((forth - back) / (2 * share)).item()
        assert found[source, target] == pytest.approx(slope_of_path, rel=0.03, abs=0.01 * largest)


def test_an_edge_is_the_slope_of_patching_its_path(tiny_model: LoadedModel, family: str) -> None:
    assert_edges_are_slopes_of_paths(tiny_model, family)


@pytest.mark.parametrize("name", OTHERS)
def test_an_edge_is_that_slope_whatever_is_peculiar_to_the_family(
    other_models: Callable[[str], LoadedModel], name: str
) -> None:
    assert_edges_are_slopes_of_paths(other_models(name), name)


def test_there_is_an_edge_wherever_one_component_writes_before_another_reads(
    tiny_model: LoadedModel,
) -> None:
    clean = at_clean(tiny_model)
    edges = edges_of(tiny_model, clean, resampled(tiny_model, clean))
    shape = tiny_model.architecture
    a, b = Component.head(1, 0), Component(Kind.MLP, 1)
    found = strengths(edges)
    assert ((a, b) in found) == (not shape.parallel_blocks)
    assert (b, a) not in found
    assert (a, Component.head(1, 1)) not in found
    layer = shape.n_heads + 1
    within = 0 if shape.parallel_blocks else shape.n_heads
    between = layer**2 * shape.n_layers * (shape.n_layers - 1) // 2
    n_nodes = layer * shape.n_layers
    # Within layers, between layers, out of the embedding, into the unembedding, and straight through.
    assert edges.total == within * shape.n_layers + between + 2 * n_nodes + 1 == len(found)
    assert edges.share == pytest.approx(1)


def assert_leaving_edges_sum_to_estimates(
    model: LoadedModel, family: str, granularity: Granularity
) -> None:
    clean = at_clean(model)
    new = resampled(model, clean, start=0)
    paths: list[Any] = [[clean]]
    if granularity is Granularity.BLOCKS or models.NAMES[family].attn_post_norm is None:
        paths.append(StraightPath(model, IDS, OTHER, METRIC, steps=3))
    for path in paths:
        found = strengths(edges_of(model, clean, new, granularity=granularity, path=path))
        sources = sorted({source for source, _ in found}, key=str)
        expected = estimates(sources, clean.run, new, path)
        leaving = torch.tensor(
            [sum(found[pair] for pair in found if pair[0] == source) for source in sources]
        )
        scale = expected.abs().max().item()
        torch.testing.assert_close(leaving, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_the_edges_that_leave_a_component_sum_to_its_estimate(
    tiny_model: LoadedModel, family: str, granularity: Granularity
) -> None:
    assert_leaving_edges_sum_to_estimates(tiny_model, family, granularity)


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("name", OTHERS)
def test_they_sum_to_it_whatever_is_peculiar_to_the_family(
    other_models: Callable[[str], LoadedModel], name: str, granularity: Granularity
) -> None:
    assert_leaving_edges_sum_to_estimates(other_models(name), name, granularity)


def test_the_strongest_are_told_first_with_the_share_that_they_carry(
    tiny_model: LoadedModel,
) -> None:
    clean = at_clean(tiny_model)
    new = resampled(tiny_model, clean)
    every, some = edges_of(tiny_model, clean, new), edges_of(tiny_model, clean, new, count=9)
    sizes = [abs(edge.strength) for edge in every.strongest]
    assert sizes == sorted(sizes, reverse=True)
    assert some.strongest == every.strongest[:9]
    assert some.share == pytest.approx(sum(sizes[:9]) / sum(sizes))
    assert some.total == every.total
    assert min(edge.strength for edge in every.strongest) < 0


def test_targets_of_a_few_layers_at_a_time_give_the_same_edges(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = at_clean(tiny_model)
    new = resampled(tiny_model, clean)
    at_once = strengths(edges_of(tiny_model, clean, new))
    monkeypatch.setattr(edging, "_TARGETS_BYTES", 1)
    in_parts = strengths(edges_of(tiny_model, clean, new))
    assert in_parts.keys() == at_once.keys()
    for pair, strength in at_once.items():
        assert in_parts[pair] == pytest.approx(strength, rel=1e-3, abs=1e-4)


def test_they_can_be_stopped(tiny_model: LoadedModel) -> None:
    class Stops(Silent):
        def checkpoint(self) -> None:
            raise Cancelled

    clean = at_clean(tiny_model)
    new = resampled(tiny_model, clean)
    with pytest.raises(Cancelled):
        strongest_edges(tiny_model, clean.run, [clean], new, Granularity.HEADS, 5, Stops())
