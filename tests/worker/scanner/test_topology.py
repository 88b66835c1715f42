import json
from pathlib import Path

import pyarrow as pa
import pytest

from neural_mri.contract.models import Architecture, NormPlacement
from neural_mri.contract.problems import UnsupportedModel
from neural_mri.contract.results import SCHEMAS, provenance_of
from tests import models
from worker.scanner import topology


def scan(family: str) -> dict[str, pa.Table]:
    return topology.scan_topology(models.configuration(family))


def total(table: pa.Table) -> int:
    return sum(table["parameters"].to_pylist())


def test_parameters_add_up_to_the_models_each_storage_once(family: str) -> None:
    exact = sum(parameter.numel() for parameter in models.build(family).parameters())
    tables = scan(family)
    assert total(tables["topology"]) == exact
    assert total(tables["parameters"]) == exact
    assert provenance_of(tables["topology"]).parameters["n_parameters"] == exact


def test_every_component_stands_once_in_reading_order(family: str) -> None:
    shape = topology.architecture(models.configuration(family))
    expected = ["embed"]
    for layer in range(shape.n_layers):
        expected.append(f"blocks.{layer}.attn")
        expected += [f"blocks.{layer}.attn.head_{head}" for head in range(shape.n_heads)]
        expected.append(f"blocks.{layer}.mlp")
    expected.append("unembed")
    assert scan(family)["topology"]["component"].to_pylist() == expected


def test_a_head_owns_its_slices_and_shares_its_groups_key_value_head(family: str) -> None:
    shape = topology.architecture(models.configuration(family))
    biases = {"gpt2": (1, 2), "pythia": (1, 2), "qwen2": (1, 2)}.get(family, (0, 0))
    query_and_output = (2 * shape.d_model + biases[0]) * shape.d_head
    key_and_value = (2 * shape.d_model + biases[1]) * shape.d_head
    grouped = shape.n_kv_heads < shape.n_heads
    rows = scan(family)["topology"].to_pylist()
    heads = [row for row in rows if row["kind"] == "head"]
    assert {row["parameters"] for row in heads} == {
        query_and_output + (0 if grouped else key_and_value)
    }
    assert {row["shared_parameters"] for row in heads} == {key_and_value if grouped else 0}
    assert [row["kv_head"] for row in heads[: shape.n_heads]] == [
        head * shape.n_kv_heads // shape.n_heads for head in range(shape.n_heads)
    ]


def test_a_tied_unembedding_is_shared_and_an_untied_one_its_own(family: str) -> None:
    shape = topology.architecture(models.configuration(family))
    unembed = scan(family)["topology"].to_pylist()[-1]
    matrix = shape.d_vocab * shape.d_model
    final_norm = shape.d_model * (2 if shape.norm == "layer" else 1)
    if shape.tied_embeddings:
        assert (unembed["parameters"], unembed["shared_parameters"]) == (final_norm, matrix)
    else:
        assert (unembed["parameters"], unembed["shared_parameters"]) == (final_norm + matrix, 0)


def test_the_parameter_table_names_what_is_tied(family: str) -> None:
    model = models.build(family)
    rows = {row["name"]: row for row in scan(family)["parameters"].to_pylist()}
    assert set(rows) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert tuple(rows[name]["shape"]) == tuple(parameter.shape)
        tied_to = rows[name]["tied_to"]
        assert rows[name]["parameters"] == (0 if tied_to else parameter.numel())
        if tied_to:
            assert model.get_parameter(tied_to) is parameter


def test_the_architecture_is_read_off_the_model() -> None:
    shapes = {name: topology.architecture(models.configuration(name)) for name in models.FAMILIES}
    assert shapes["gpt2"] == Architecture(
        family="gpt2",
        n_layers=2,
        n_heads=3,
        n_kv_heads=3,
        d_model=24,
        d_head=8,
        d_mlp=96,
        d_vocab=61,
        n_ctx=64,
        activation="gelu_new",
        gated_mlp=False,
        norm="layer",
        norm_placement=NormPlacement.PRE,
        parallel_blocks=False,
        tied_embeddings=True,
        positions="learned",
    )
    assert {name for name, shape in shapes.items() if shape.parallel_blocks} == {"pythia"}
    assert {name for name, shape in shapes.items() if not shape.gated_mlp} == {"gpt2", "pythia"}
    assert {name for name, shape in shapes.items() if shape.norm == "layer"} == {"gpt2", "pythia"}
    assert {name: shape.norm_placement for name, shape in shapes.items()} == {
        **dict.fromkeys(models.FAMILIES, NormPlacement.PRE),
        "gemma2": NormPlacement.PRE_AND_POST,
        "gemma3": NormPlacement.PRE_AND_POST,
        "olmo2": NormPlacement.POST,
    }
    assert shapes["gemma2"].attention_softcap == 50.0
    assert shapes["gemma2"].final_softcap == 30.0
    assert shapes["gemma3"].sliding_windows == (4, None, 4)
    assert shapes["mistral"].sliding_windows == (5, 5, 5)
    neo = topology.architecture(models.configuration("gpt_neo"))
    assert neo.sliding_windows == (None, 4, None)
    assert shapes["qwen3"].d_head == 10
    assert {shape.d_mlp for name, shape in shapes.items() if name != "gpt2"} == {40}


def test_a_folder_without_weights_is_enough(family: str, tmp_path: Path) -> None:
    models.configuration(family).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    tables, expected = topology.scan_topology(tmp_path), scan(family)
    assert all(tables[name].equals(expected[name]) for name in expected)


def test_the_tables_are_as_their_schemas_say(family: str) -> None:
    for name, table in scan(family).items():
        assert tuple(table.schema) == SCHEMAS[name].fields
        assert provenance_of(table).unit == "parameters"


@pytest.mark.parametrize(
    ("configuration", "missing"),
    [
        ({"model_type": "mixtral", "num_hidden_layers": 2}, "dense MLP"),
        ({"model_type": "vit"}, "causal language model"),
        ({"model_type": "no-such-family"}, "no configuration that transformers can read"),
    ],
)
def test_a_family_that_cannot_be_shown_is_refused(
    configuration: dict[str, object], missing: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    with pytest.raises(UnsupportedModel, match=missing):
        topology.scan_topology(tmp_path)
