"""Reference text: what the model itself writes when it is left to itself.

Text in the model's own distribution by construction, with no file and no licence. Seeded, and drawn on the
CPU in float64, so that one seed gives one text wherever the model's own digits agree.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.tokens import Tokens
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel

__all__ = ("TEXT_TOKENS", "given_text", "sampled_text")

TEXT_TOKENS = 64
"""Length of a reference text, about that of a prompt; shorter where the model's context is."""


@torch.inference_mode()
def sampled_text(
    model: LoadedModel, n_tokens: int, *, seed: int, prefix: Sequence[int], listener: Listener
) -> Int[Tensor, "text pos"]:
    """About `n_tokens` tokens at temperature 1, as texts of one length, written side by side.

    Each begins with `prefix`, what the tokenizer puts before every prompt. Without one, the model is
    given its own start token to begin with, which is then left out, as it is of prompts.

    Raises:
        Unprocessable: The prefix has an id that the model does not have.
        Cancelled: The listener stopped it.
    """
    start = list(prefix) or [_start_token(model)]
    if not all(0 <= token_id < model.architecture.d_vocab for token_id in start):
        raise Unprocessable(
            f"the tokenizer begins prompts with token ids {start}: expected 0 to "
            f"{model.architecture.d_vocab - 1}"
        )
    length = _text_length(model) - len(prefix)
    n_texts = max(1, n_tokens // (length + len(prefix)))
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor([start], device=model.device).expand(n_texts, -1)
    written, cache, given = [], None, first
    for done in range(1, length + 1):
        run = model.plain(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = run.past_key_values
        given = _drawn(run.logits[:, -1], generator).to(model.device)
        written.append(given)
        listener.progress("sampling", done, length)
        listener.pause()
    text = torch.cat(written, dim=1)
    return torch.cat([first, text], dim=1) if prefix else text


def given_text(
    model: LoadedModel, texts: Sequence[Tokens], n_tokens: int
) -> Int[Tensor, "text pos"]:
    """Texts of a user's, one after another, cut to one length; at most `n_tokens`.

    Raises `Unprocessable` for less than two such texts, or an id that the model does not have.
    """
    ids = [token_id for text in texts for token_id in text.ids][:n_tokens]
    length = _text_length(model)
    whole = len(ids) // length
    if whole < 2:
        raise Unprocessable(
            f"texts have {len(ids)} tokens together: expected at least {2 * length}",
            n_tokens=len(ids),
        )
    if not all(0 <= token_id < model.architecture.d_vocab for token_id in ids):
        raise Unprocessable(
            f"texts have token ids from {min(ids)} to {max(ids)}: expected 0 to "
            f"{model.architecture.d_vocab - 1}"
        )
    return torch.tensor(ids[: whole * length], device=model.device).view(whole, length)


def _text_length(model: LoadedModel) -> int:
    return min(TEXT_TOKENS, model.architecture.n_ctx)


def _start_token(model: LoadedModel) -> int:
    """The configuration's token to begin with, or end with, where the model has it; else its first."""
    config = model.plain.config
    known = (config.bos_token_id, config.eos_token_id)
    # Configurations name tokens that were never given a row: to read one ends a GPU's process.
    ids = range(model.architecture.d_vocab)
    return next((token for token in known if isinstance(token, int) and token in ids), 0)


def _drawn(logits: Tensor, generator: torch.Generator) -> Int[Tensor, "text 1"]:
    """A token for each row, by where a uniform number falls in its cumulative distribution."""
    cumulative = logits.cpu().float().softmax(-1).double().cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.clamp_max(logits.shape[-1] - 1)
