from typing import Any

from neural_mri.backing import models
from neural_mri.backing.database import Sessions
from neural_mri.contract.models import Architecture, NormPlacement, Numerics

SHAPE = Architecture(
    family="llama",
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_model=64,
    d_head=16,
    d_mlp=96,
    d_vocab=1000,
    n_ctx=128,
    activation="silu",
    gated_mlp=True,
    norm="rms",
    norm_placement=NormPlacement.PRE,
    parallel_blocks=False,
    tied_embeddings=True,
    positions="rotary",
    sliding_windows=(None, 16),
)


def description(name: str = "tiny", **changes: Any) -> dict[str, Any]:
    fields = {
        "name": name,
        "source": "folder:/models/tiny",
        "folder": name,
        "revision": "0" * 64,
        "tokenizer_digest": "1" * 64,
        "architecture": SHAPE,
        "n_parameters": 5_000_000_000,
        "weights_bytes": 20_000_000_000,
        "quantization": "Q4_1",
        "numerics": Numerics(dtype="bfloat16"),
    }
    return {**fields, **changes}


def test_a_model_is_read_back_as_it_was_registered(sessions: Sessions) -> None:
    registered = sessions.write(models.register, **description())
    found = sessions.read(models.get, "tiny")
    assert found == registered
    assert found.architecture == SHAPE
    assert found.numerics == Numerics(dtype="bfloat16")
    assert found.n_parameters == 5_000_000_000
    assert not found.wanted


def test_there_is_no_model_that_nobody_registered(sessions: Sessions) -> None:
    assert sessions.read(models.get, "gpt2") is None
    assert sessions.write(models.set_wanted, "gpt2", True) is None


def test_registering_again_replaces(sessions: Sessions) -> None:
    sessions.write(models.register, **description())
    sessions.write(models.register, **description(revision="2" * 64))
    [model] = sessions.read(models.all)
    assert model.revision == "2" * 64


def test_models_are_listed_by_name(sessions: Sessions) -> None:
    for name in ("qwen", "gpt2", "tiny"):
        sessions.write(models.register, **description(name))
    assert [model.name for model in sessions.read(models.all)] == ["gpt2", "qwen", "tiny"]


def test_whether_a_model_should_be_held_is_remembered(sessions: Sessions) -> None:
    sessions.write(models.register, **description())
    wanted = sessions.write(models.set_wanted, "tiny", True)
    assert wanted is not None
    assert wanted.wanted
    assert sessions.read(models.get, "tiny") == wanted
