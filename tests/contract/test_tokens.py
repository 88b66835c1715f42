"""Prompts as models read them."""

import msgspec
from hypothesis import given

from neural_mri.contract.tokens import Tokens
from tests.contract.strategies import tokens


@given(tokens())
def test_tokens_read_back_as_they_were_written(prompt: Tokens) -> None:
    assert msgspec.json.decode(msgspec.json.encode(prompt), type=Tokens) == prompt
    assert len(prompt) == len(prompt.ids)
