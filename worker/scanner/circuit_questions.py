"""What a scan that compares runs reads, and which next token it asks about."""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neural_mri.contract.circuits import CircuitScan
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scans import resolve_positions
from neural_mri.contract.tokens import Tokens
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.prompts import read_until, token_ids

__all__ = ("Prompts", "Question", "paired_ids")


class Prompts(NamedTuple):
    """What is read: up to the position whose next token is asked about, since what follows is not seen."""

    ids: Int[Tensor, "batch pos"]
    """The clean prompt, and the corrupt one where there is one."""
    start: int
    """The first position at which components are replaced."""

    @classmethod
    def of(
        cls, model: LoadedModel, request: CircuitScan, tokens: Tokens, corrupt: Tokens | None
    ) -> Self:
        """Raises `Unprocessable` where the prompts do not correspond."""
        if (corrupt is None) != (request.corrupt_prompt is None):
            raise ValueError("tokens of the corrupt prompt are expected where the request has one")
        ids = token_ids(model, tokens) if corrupt is None else paired_ids(model, tokens, corrupt)
        position = resolve_positions((request.target_token_idx,), len(tokens))[0]
        start = 0 if request.include_first_token else 1
        if position < start:
            raise Unprocessable(
                "nothing can be replaced: the next token after position 0 is asked about, and components "
                "are replaced from position 1 on; set include_first_token, or ask about a later position"
            )
        return cls(ids[:, : read_until(model, position, len(tokens))], start)


def paired_ids(
    model: LoadedModel, tokens: Tokens, corrupt: Tokens
) -> Int[Tensor, "clean_and_corrupt pos"]:
    """A prompt and the corrupt one. Raises `Unprocessable` where they are not of one length."""
    if len(corrupt) != len(tokens):
        raise Unprocessable(
            f"the corrupt prompt has {len(corrupt)} tokens and the prompt {len(tokens)}: "
            "expected as many, or positions would not correspond",
            n_tokens=len(tokens),
            n_corrupt_tokens=len(corrupt),
        )
    return torch.cat([token_ids(model, tokens), token_ids(model, corrupt)])


class Question(NamedTuple):
    """The tokens asked about."""

    answer_id: int | None
    foil_id: int | None

    @classmethod
    def of(cls, model: LoadedModel, answer_id: int | None, foil_id: int | None) -> Self:
        """Raises `Unprocessable` for a token that the model does not have."""
        d_vocab = model.architecture.d_vocab
        for name, token_id in (("answer", answer_id), ("foil", foil_id)):
            if token_id is not None and not 0 <= token_id < d_vocab:
                raise Unprocessable(f"{name} is token {token_id}: expected 0 to {d_vocab - 1}")
        return cls(answer_id, foil_id)

    def metric(self, logits: Float[Tensor, " d_vocab"]) -> Metric:
        """The metric; its answer is the likeliest token where none is named."""
        answer_id = int(logits.argmax()) if self.answer_id is None else self.answer_id
        if answer_id == self.foil_id:
            raise Unprocessable(
                f"answer and foil are both token {answer_id}: expected two that can differ"
            )
        return Metric(answer_id, self.foil_id)
