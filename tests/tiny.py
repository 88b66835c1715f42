"""A whole model folder that takes no time: three layers of Llama and a tokenizer of 61 words."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests import models

__all__ = ("save_tiny_model",)


def save_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write it; its words are w0 (also every unknown one) to w60."""
    models.save("llama", folder, seed=seed)
    words = {f"w{index}": index for index in range(models.D_VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
