"""Prompts as models read them."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from api.tokenization import tokens_of
from neural_mri.backing import keys
from neural_mri.contract.tokens import Tokens
from tests.api.specimens import PROMPT, tiny_tokenizer
from tests.api.world import World

BYTE_LEVEL = tiny_tokenizer()


def byte_fallback() -> Tokenizer:
    """As Llama-2, Mistral and Gemma have it: a word mark for spaces, bytes for what is unknown."""
    words = ["▁the", "▁", "t", "h", "e", "▁t", "▁th"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + index for index, word in enumerate(words)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


BYTE_FALLBACK = byte_fallback()

TRIMMING = tiny_tokenizer()
TRIMMING.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)


def read(prompt: str, tokenizer: Tokenizer = BYTE_LEVEL) -> Tokens:
    return tokens_of(tokenizer.encode(prompt), prompt)


def test_ordinary_tokens_are_their_own_text_and_the_bos_has_no_characters() -> None:
    tokens = read(PROMPT)
    assert tokens.texts == ("<|begin|>", "The", " Eiffel", " Tower", " is", " in", " Paris")
    assert [PROMPT[span.start : span.end] for span in tokens.spans] == ["", *tokens.texts[1:]]


@pytest.mark.parametrize("text", ["한국어", "🧠", "é🧲한", "e\u0301", "👩‍🔬"])
def test_the_first_token_of_a_character_carries_it(text: str) -> None:
    tokens = read(f"The {text} is")
    assert "".join(tokens.texts[1:]) == f"The {text} is"
    assert "" in tokens.texts  # the others of the character show nothing
    assert not any("\ufffd" in shown for shown in tokens.texts)
    for text_shown, span in zip(tokens.texts, tokens.spans, strict=True):
        assert (
            not text_shown
            or text_shown in f"The {text} is"[span.start : span.end]
            or (text_shown == "<|begin|>")
        )


@pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, BYTE_FALLBACK, TRIMMING], ids=["bytes", "fallback", "trimming"]
)
@settings(deadline=None)
@given(prompt=st.text(min_size=1, max_size=30))
def test_texts_put_together_are_the_prompt_and_spans_stay_inside(
    tokenizer: Tokenizer, prompt: str
) -> None:
    encoding = tokenizer.encode(prompt)
    tokens = tokens_of(encoding, prompt)
    own = [
        text
        for text, added in zip(tokens.texts, encoding.special_tokens_mask, strict=True)
        if not added
    ]
    assert "".join(own) == prompt
    assert tokens.ids == tuple(encoding.ids)
    assert len(tokens.texts) == len(tokens.spans) == len(tokens.ids)
    assert all(0 <= span.start <= span.end <= len(prompt) for span in tokens.spans)
    starts = [span.start for span in tokens.spans]
    assert starts == sorted(starts)


def test_the_route_answers_what_a_scan_reads(api: httpx.Client, world: World) -> None:
    prompt = "The 🧠 is in 한국"
    answer = api.post("/api/tokenize", json={"prompt": prompt})
    assert answer.status_code == 200
    api.post("/api/scan/activation", json={"prompt": prompt})
    job = world.claim(world.queue())
    assert job.tokens is not None
    assert answer.json()["ids"] == list(job.tokens.ids)
    assert answer.json()["texts"] == list(job.tokens.texts)


def test_a_prompt_beyond_the_context_is_refused_by_both(api: httpx.Client) -> None:
    long = {"prompt": "z" * 3000}
    for path in ("/api/tokenize", "/api/scan/activation"):
        answer = api.post(path, json=long)
        assert answer.status_code == 422
        assert answer.json()["n_tokens"] == 3001
        assert answer.json()["limit"] == 64


def test_a_tokenizer_that_the_store_lost_is_the_services_fault(
    api: httpx.Client, world: World
) -> None:
    model = world.register("other", weights="other", tokenizer_digest="0" * 64)
    answer = api.post("/api/tokenize", json={"prompt": "a", "model": model.name})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    body = BYTE_LEVEL.to_str().encode()
    world.store.put(keys.tokenizer_path("0" * 64), body)
    assert api.post("/api/tokenize", json={"prompt": "a", "model": "other"}).status_code == 200
    world.store.delete(keys.tokenizer_path("0" * 64))


def test_truncation_and_padding_of_a_tokenizers_file_are_not_applied(
    api: httpx.Client, world: World
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=50)
    digest = "1" * 64
    world.store.put(keys.tokenizer_path(digest), tokenizer.to_str().encode())
    world.register("cutting", weights="cutting", tokenizer_digest=digest)
    answer = api.post("/api/tokenize", json={"prompt": PROMPT, "model": "cutting"})
    assert len(answer.json()["ids"]) == 7
