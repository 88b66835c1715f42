"""Likely next tokens, as several summaries name them."""

import msgspec
import pyarrow as pa

from neural_mri.contract.summaries.base import rows

__all__ = ("Prediction", "predictions")


class Prediction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A likely next token after `position`."""

    position: int
    rank: int
    token: str
    token_id: int
    logit: float
    log_probability: float
    """In nats."""
    prob: float


def predictions(table: pa.Table) -> tuple[Prediction, ...]:
    """All of a table's, in its order: likeliest first at each position."""
    columns = ("position", "rank", "text", "token_id", "logit", "log_probability", "probability")
    return tuple(
        Prediction(
            position=position,
            rank=rank,
            token=text,
            token_id=token_id,
            logit=logit,
            log_probability=log_probability,
            prob=probability,
        )
        for position, rank, text, token_id, logit, log_probability, probability in rows(
            table, *columns
        )
    )
