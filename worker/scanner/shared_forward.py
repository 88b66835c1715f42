"""One forward of the plain model, and all who read it.

A forward takes as long to begin as to run: what several scans want of prompts of one length is read from one
batch, a row a prompt, each scan by hooks of its own on rows of its own. Readers change nothing, so that any of
them may stand beside any other; a prompt that two of them ask about is one row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neural_mri.contract.problems import Problem
from neural_mri.contract.tokens import Tokens
from worker.scanner.hooks import awake, computed_by, hooked, own_forward, set_aside, tensor_in
from worker.scanner.listening import Cancelled, Listener, Silent, Timed
from worker.scanner.loading import LoadedModel
from worker.scanner.prompts import ScanOutput

__all__ = (
    "AskedOf",
    "Company",
    "ForwardRead",
    "Outcome",
    "Reads",
    "RowsOf",
    "nobody_waits",
    "outcome_of",
    "read_forward",
    "settled",
)


_ROWS_AT_ONCE = 96
"""Positions whose logits are computed between two questions whether anybody still waits: 40 ms on a CPU."""
_ROWS_AT_ONCE_OF_SEVERAL = 3 * _ROWS_AT_ONCE
"""The same of several scans, which stop only when all of them are wanted no more. To put portions together is to
copy them: an eighth more than the product, of a dozen prompts of a dozen tokens."""


class AskedOf(NamedTuple):
    """A prompt among others, who hears of it, and the next tokens that are asked about."""

    tokens: Tokens
    listener: Listener
    answer_id: int | None = None
    """The model's likeliest where None."""
    foil_id: int | None = None


Outcome: TypeAlias = ScanOutput | Problem | Cancelled
"""What became of one scan among others: its tables, or what kept it from them alone."""


def nobody_waits(_outcomes: Mapping[int, Outcome]) -> None:
    """Whoever takes all outcomes together."""


def outcome_of(work: Callable[[], ScanOutput]) -> Outcome:
    """What the work gives, or why one scan stops where the others go on."""
    try:
        return work()
    except (Problem, Cancelled) as reason:
        return reason


def settled(outcome: Outcome) -> ScanOutput:
    """The tables of a scan that is nobody's company. Raises what kept it from them."""
    if isinstance(outcome, ScanOutput):
        return outcome
    raise outcome


class Company(Silent):
    """The listeners of one forward, as one: it goes on while any of them waits for it."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)

    def __len__(self) -> int:
        return len(self._listeners)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Everybody hears it."""
        for listener in self._listeners:
            listener.progress(stage, done, total)

    def checkpoint(self) -> None:
        """Raises `Cancelled` when nobody waits any more."""
        self._go_on(lambda listener: listener.checkpoint())

    def pause(self) -> None:
        """The same; meanwhile none of the readers in place is heeded."""
        with set_aside():
            self._go_on(lambda listener: listener.pause())

    def _go_on(self, ask: Callable[[Listener], None]) -> None:
        """Ask until one waits: whether the others still do makes no difference now."""
        stopped = None
        for listener in self._listeners:
            try:
                ask(listener)
            except Cancelled as cancelled:
                stopped = cancelled
            else:
                return
        if stopped is not None:
            raise stopped


class RowsOf:
    """Some rows of a batch."""

    def __init__(self, rows: Sequence[int], n_rows: int) -> None:
        self._rows = list(rows)
        self._are_all = self._rows == list(range(n_rows))
        first = self._rows[0]
        self._slice = slice(first, first + len(self._rows))
        self._is_slice = self._rows == list(range(self._slice.start, self._slice.stop))

    def __call__(self, value: Float[Tensor, "row *rest"]) -> Float[Tensor, "own *rest"]:
        """Theirs of a batch's values: the very same tensor where that is all, a view where it can be."""
        if self._are_all:
            return value
        if self._is_slice:
            return value[self._slice]
        return value[self._rows]


class Reads(Protocol):
    """What one scan, or several that ask the same, read of a forward."""

    @property
    def logits_at(self) -> Sequence[int]:
        """Where it wants logits: positions of the batch, one row's after another's."""

    def listening(self) -> AbstractContextManager[None]:
        """Read the model's next forward."""


class ForwardRead(NamedTuple):
    """What a forward left behind beside what its readers hold."""

    logits: list[Float[Tensor, "place d_vocab"]]
    """Each reader's, where it wanted them."""
    seconds: float
    """Without the pauses in it."""


def read_forward(
    model: LoadedModel,
    ids: Int[Tensor, "row pos"],
    readers: Sequence[Reads],
    company: Company,
) -> ForwardRead:
    """Run the plain model once. It is as it was afterwards, whatever happened.

    Raises `Cancelled` when nobody in the company waits any more.
    """
    places = [place for reader in readers for place in reader.logits_at]
    timed = Timed(company)
    with ExitStack() as reading:
        for reader in readers:
            reading.enter_context(reader.listening())
        reading.enter_context(_hearing(model, timed))
        reading.enter_context(_unembedding_in_portions(model, company))
        if places:
            if places != list(range(ids.numel())):
                reading.enter_context(_unembedding(model, places))
            logits = model.plain(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        else:
            model.plain.base_model(input_ids=ids, use_cache=False)
            logits = torch.empty(0, model.architecture.d_vocab)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = timed.own_seconds
    places_of_each = [len(reader.logits_at) for reader in readers]
    return ForwardRead(list(torch.split(logits, places_of_each)), seconds)


def _hearing(model: LoadedModel, listener: Listener) -> AbstractContextManager[None]:
    """Let somebody hear of each block of the next forward, after whoever reads it."""
    blocks = model.modules.blocks

    def after(layer: int, *_: Any) -> None:
        listener.progress("forward", layer + 1, len(blocks))
        listener.pause()

    return hooked(*((block.block, partial(after, layer)) for layer, block in enumerate(blocks)))


@contextmanager
def _unembedding_in_portions(model: LoadedModel, company: Company) -> Iterator[None]:
    """Let the company be asked between portions of a long prompt's logits, where a CPU computes them.

    They are a sixth of a small model's forward pass, and one product that nobody can stop. Only where oneDNN
    computes it (`linear_maps`), which gives a row the same digits whatever rows are beside it.
    """
    module, is_ours = model.modules.unembed, awake()
    at_once = _ROWS_AT_ONCE if len(company) == 1 else _ROWS_AT_ONCE_OF_SEVERAL
    whole = own_forward(module)
    if whole is None or model.device.type != "cpu":
        yield
        return

    def forward(read: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_vocab"]:
        rows = read.flatten(0, -2)
        if len(rows) <= at_once or not is_ours():
            return whole(read)
        found = read.new_empty(len(rows), model.architecture.d_vocab)
        for at in range(0, len(rows), at_once):
            company.checkpoint()
            found[at : at + at_once] = whole(rows[at : at + at_once])
        return found.view(*read.shape[:-1], -1)

    with computed_by({module: forward}):
        yield


@contextmanager
def _unembedding(model: LoadedModel, places: Sequence[int]) -> Iterator[None]:
    """Give the unembedding only some positions of the batch: it is a fifth of a small model's work."""
    at = torch.tensor(places)

    def choose(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        final = tensor_in(args)
        chosen = final.flatten(0, -2).index_select(0, at.to(final.device))
        return (chosen.unsqueeze(0), *args[1:])

    with hooked(before=[(model.modules.unembed, choose)]):
        yield
