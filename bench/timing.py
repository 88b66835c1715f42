"""Fair comparisons on a machine that does other things too."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from neural_mri.contract.tokens import Span, Tokens
from worker.scanner.loading import LoadedModel

__all__ = ("Row", "clock", "median_seconds", "plain_forward", "prompt", "published")


class Row(NamedTuple):
    """One line of the table."""

    what: str
    n_tokens: int
    seconds: float
    plain_seconds: float
    """One plain forward of the same prompt, in the same rounds."""
    goal: float | None = None
    """Highest ratio that is good enough; None where there is no bar."""

    @property
    def ratio(self) -> float:
        """Cost in plain forwards."""
        return self.seconds / self.plain_seconds


def clock() -> float:
    """Seconds, of which only differences mean anything.

    Where PyTorch runs on one thread, the process's processor time, which leaves out what others do on a busy
    machine; wall time otherwise.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def median_seconds(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3
) -> dict[str, float]:
    """Median time of each candidate, run in turn, round after round.

    In turn, so that a slow minute of the machine falls on all of them alike. Measured by `clock`.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, run in candidates.items():
            started = clock()
            run()
            if number >= warm_up:
                times[name].append(clock() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def prompt(model: LoadedModel, n_tokens: int, *, seed: int = 0) -> Tokens:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.architecture.d_vocab, (n_tokens,), generator=generator)
    return Tokens(
        ids=tuple(ids.tolist()),
        texts=("x",) * n_tokens,
        spans=tuple(Span(at, at + 1) for at in range(n_tokens)),
    )


@lru_cache(maxsize=1)
def published(model: LoadedModel) -> PreTrainedModel:
    """The model as Hugging Face and PyTorch run it, nothing of ours in it, on the same tensors."""
    shared: dict[int, object] = {
        id(tensor): tensor for tensor in (*model.plain.parameters(), *model.plain.buffers())
    }
    twin = copy.deepcopy(model.plain, shared)
    for module in twin.modules():
        # What `linear_maps` and `spreading` put there, over the class's own.
        vars(module).pop("forward", None)
    return twin


def plain_forward(model: LoadedModel, tokens: Tokens, *, n_rows: int = 1) -> Callable[[], object]:
    """What everything is measured against: one forward of Hugging Face's, all logits, no cache."""
    ids = torch.tensor([tokens.ids], device=model.device).expand(n_rows, -1)
    plain = published(model)

    @torch.inference_mode()
    def run() -> object:
        logits = plain(input_ids=ids, use_cache=False).logits
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return logits

    return run
