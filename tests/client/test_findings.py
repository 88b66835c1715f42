"""Weights, circuits, the lens and stimulation: what is asked, and the numbers in tables and pictures."""

import io
from collections.abc import Callable
from math import isnan
from typing import cast

import msgspec
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from api.redaction import redacted_table
from neural_mri.client import Client, Result
from neural_mri.client.client import _PATHS
from neural_mri.client.colour import Scale, Values, blue_orange
from neural_mri.client.drawing import NOTHING
from neural_mri.contract.components import EMBED, Component, Kind
from neural_mri.contract.events import EffectsFrame, Event
from neural_mri.contract.perturbations import Amplify, PatchSite, ZeroAblation
from neural_mri.contract.scans import (
    AnomalyScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    ScanKind,
    TracingScan,
    WeightScan,
    decode_scan,
)
from tests.client.findings import divergence, effect_of, restored, size_of
from tests.client.specimens import ARCHITECTURE, SCAN_KEY, TOKENS
from tests.client.wire import Wire

PROMPT = "The Eiffel Tower is in"
N_TOKENS = len(TOKENS)

Ask = Callable[[Client], Result]

EVERY_KIND: dict[str, Ask] = {
    "weights": lambda client: client.scan_weights(),
    "what changed": lambda client: client.scan_weights(baseline="tiny"),
    "circuits": lambda client: client.scan_circuits(PROMPT),
    "direct": lambda client: client.scan_circuits(PROMPT, method="direct"),
    "anomaly": lambda client: client.scan_anomaly(PROMPT),
    "perturb": lambda client: client.perturb(PROMPT),
    "perturb, answer alone": lambda client: client.perturb(PROMPT, perturbed_scan=False),
    "patching": lambda client: client.patching(PROMPT, "x", sites=["resid_pre", "head"]),
    "trace": lambda client: client.trace(PROMPT, "Eiffel"),
    "calibrate": lambda client: client.calibrate(),
}


def pictured(axis: Axes) -> Values:
    (image,) = axis.get_images()
    shown = np.ma.asarray(image.get_array(), dtype=np.float32)
    values: Values = shown.filled(np.nan)
    return values


def written(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in cast("list[Text]", figure.findobj(Text)))


def test_every_kind_of_scan_has_an_address() -> None:
    assert set(_PATHS) == set(ScanKind)


def test_each_request_goes_to_its_own_address_as_it_was_asked(wire: Wire, client: Client) -> None:
    zero = ZeroAblation(component="blocks.1.attn.h2")
    client.scan_weights(layers=[1], baseline="tiny", outlier_sigma=4)
    client.scan_circuits(PROMPT, answer=" Paris", foil=52, corrupt_prompt="x", method="ablation")
    client.scan_anomaly(PROMPT, lens="raw", token_positions=[-1], sublayers="none")
    client.perturb(PROMPT, [zero, Amplify(component="blocks.3.mlp")], calibration=SCAN_KEY)
    client.patching(PROMPT, "x", direction="noising", sites=["head"])
    client.trace(PROMPT, "Eiffel", kinds=["mlp"], window=3)
    client.calibrate(texts=["a text"], lenses=["bias", "ridge"])
    asked = {ask.path: decode_scan(ask.body) for ask in wire.asked if ask.method == "POST"}
    assert asked == {
        "/api/scan/weights": WeightScan(
            layers=("blocks.1.attn", "blocks.1.mlp"), baseline="tiny", outlier_sigma=4.0
        ),
        "/api/scan/circuits": CircuitScan(
            prompt=PROMPT,
            answer=" Paris",
            foil=52,
            corrupt_prompt="x",
            method="ablation",  # type: ignore[arg-type]
        ),
        "/api/scan/anomaly": AnomalyScan(
            prompt=PROMPT,
            lens="raw",  # type: ignore[arg-type]
            token_positions=(-1,),
            sublayers="none",  # type: ignore[arg-type]
        ),
        "/api/perturb": PerturbationScan(
            prompt=PROMPT,
            perturbations=(zero, Amplify(component="blocks.3.mlp")),
            calibration=SCAN_KEY,
        ),
        "/api/perturb/patching": PatchingScan(
            prompt=PROMPT,
            corrupt_prompt="x",
            direction="noising",  # type: ignore[arg-type]
            sites=(PatchSite.HEAD,),
        ),
        "/api/perturb/trace": TracingScan(
            prompt=PROMPT,
            subject="Eiffel",
            kinds=("mlp",),  # type: ignore[arg-type]
            window=3,
        ),
        "/api/model/calibrate": CalibrationScan(
            texts=("a text",),
            lenses=("bias", "ridge"),  # type: ignore[arg-type]
        ),
    }


def test_what_is_left_out_is_as_the_request_has_it(wire: Wire, client: Client) -> None:
    client.scan_weights()
    client.scan_circuits(PROMPT)
    client.scan_anomaly(PROMPT)
    client.perturb(PROMPT)
    client.patching(PROMPT, "x")
    client.trace(PROMPT, "Eiffel")
    client.calibrate()
    assert [decode_scan(ask.body) for ask in wire.asked if ask.method == "POST"] == [
        WeightScan(),
        CircuitScan(prompt=PROMPT),
        AnomalyScan(prompt=PROMPT),
        PerturbationScan(prompt=PROMPT),
        PatchingScan(prompt=PROMPT, corrupt_prompt="x"),
        TracingScan(prompt=PROMPT, subject="Eiffel"),
        CalibrationScan(),
    ]


def test_a_word_that_no_request_knows_is_refused_before_anything_is_sent(
    wire: Wire, client: Client
) -> None:
    with pytest.raises(ValueError, match=r"'guess' is not a valid CircuitMethod: .* 'fast'"):
        client.scan_circuits(PROMPT, method="guess")
    with pytest.raises(ValueError, match=r"'sum' is not a valid Aggregation: .* 'l2_norm'"):
        client.scan_activation(PROMPT, aggregation="sum")
    assert wire.asked == []


def test_effects_are_heard_as_estimates_first_and_then_as_measurements(client: Client) -> None:
    heard: list[Event] = []
    client.scan_circuits(PROMPT, on_event=heard.append)
    assert [event.exact for event in heard if isinstance(event, EffectsFrame)] == [False, True]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_result_has_a_main_table_a_long_form_and_a_picture(client: Client, kind: str) -> None:
    result = EVERY_KIND[kind](client)
    assert result.main_table in result.table_names
    frame = result.to_pandas()
    assert len(frame) >= len(result.table())
    assert result.plot().get_suptitle().startswith(result.title)
    assert result.title in result._repr_html_()


def test_the_long_form_of_quantities_has_a_row_a_value(client: Client) -> None:
    frame = client.scan_anomaly(PROMPT).to_pandas()
    kl = frame[(frame.quantity == "kl") & (frame.component == "embed")]
    np.testing.assert_array_equal(kl.value, divergence()[0])
    assert list(kl.token) == list(TOKENS)


def test_the_ordinary_values_stand_at_their_quantiles(client: Client) -> None:
    frame = client.calibrate().to_pandas()
    kl = frame[(frame.channel == "kl") & (frame.row == 2)]
    np.testing.assert_allclose(kl["quantile"], np.arange(1, 10) / 10)
    np.testing.assert_array_equal(kl.value, np.arange(1, 10) + 2)


def test_the_strongest_effects_come_first_and_the_embedding_is_passed_over(client: Client) -> None:
    circuit = client.scan_circuits(PROMPT).circuit()
    strongest = circuit.strongest(5)
    assert [effect.component.label for effect in strongest[:4]] == [
        *("L3 MLP", "L2 MLP", "L1 MLP", "L0 MLP")
    ]
    assert strongest[4].component == Component.head(3, 2)
    assert [effect.exact for effect in strongest] == [True] * 4 + [False]
    assert EMBED not in [effect.component for effect in circuit.strongest(100)]


def test_where_nothing_was_replaced_the_direct_terms_are_shown(client: Client) -> None:
    circuit = client.scan_circuits(PROMPT, method="direct").circuit()
    assert circuit.is_direct
    assert circuit.value(circuit.strongest(1)[0]) == 4.0
    assert circuit.edges == ()


def test_a_circuits_picture_shows_the_tables_effects_around_zero(client: Client) -> None:
    result = client.scan_circuits(PROMPT)
    figure = result.plot()
    expected = [[effect_of(Component.head(layer, head)) for layer in range(4)] for head in range(3)]
    expected.append([effect_of(Component(Kind.MLP, layer)) for layer in range(4)])
    np.testing.assert_array_equal(pictured(figure.axes[0]), np.array(expected, np.float32))
    low, high = figure.axes[0].get_images()[0].get_clim()
    assert -low == high > 0
    text = written(figure)
    for said in ("log p(answer)", "nats", "L1H2 → L3 MLP", "L3 MLP", "L3H2 ≈", "(mean)"):
        assert said in text


def test_a_prompt_with_two_prices_stands_in_the_title_as_it_is(client: Client) -> None:
    result = client.scan_circuits(PROMPT)
    tokens = ("It cost", " $20", " and he got", " $5", " back")
    result.manifest = msgspec.structs.replace(result.manifest, prompt_tokens=tokens)
    figure = result.plot()
    figure.savefig(io.BytesIO())
    (title,) = [text for text in figure.findobj(Text) if "he got" in text.get_text()]
    assert "It cost $20 and he got $5 back → ␣Paris" in title.get_text()
    assert title.get_parse_math() is False


def test_the_bars_of_a_circuit_are_as_long_as_the_effects(client: Client) -> None:
    circuit = client.scan_circuits(PROMPT).circuit()
    axis = next(a for a in client.scan_circuits(PROMPT).plot().axes if len(a.patches) > 4)
    widths = [cast("Rectangle", bar).get_width() for bar in axis.patches]
    assert widths == [circuit.value(effect) for effect in circuit.strongest(len(widths))]


def test_the_lens_picture_shows_divergence_tokens_and_flags(client: Client) -> None:
    figure = client.scan_anomaly(PROMPT).plot()
    top = figure.axes[0]
    np.testing.assert_array_equal(pictured(top), divergence())
    (outlined,) = [cast("Rectangle", patch) for patch in top.patches]
    assert (outlined.get_x() + 0.47, outlined.get_y() + 0.45) == pytest.approx((4, 2))
    text = written(figure)
    for said in ("g24", "D_KL(model ‖ lens), nats", "embed", "entropy\nnats", "4 ␣in"):
        assert said in text


def test_what_is_anomalous_at_a_token_is_said_in_words(client: Client) -> None:
    lens = client.scan_anomaly(PROMPT).lens()
    assert [reading.flags for reading in lens.readings] == [
        *[()] * 4,
        ("uncertain", "unsupported", "lens x1"),
    ]
    assert isnan(lens.readings[0].entropy)
    assert [(support.role, support.support) for support in lens.asked] == [
        ("answer", -3.0),
        ("foil", 1.25),
    ]


def test_a_comparison_sets_each_token_of_either_run_side_by_side(client: Client) -> None:
    found = client.perturb(PROMPT).comparison()
    by_text = {guess.text: guess.probability for guess in found.guesses}
    assert by_text[" Paris"] == pytest.approx((0.7, 0.02))
    assert by_text[" the"].after == pytest.approx(0.6)
    assert isnan(by_text[" the"].before)
    assert [guess.text for guess in found.guesses[:2]] == [" Paris", " the"]
    assert found.likeliest("after", 1)[0].text == " the"
    assert found.kl == 2.0


def test_a_perturbations_picture_has_the_tables_bars_and_changes(client: Client) -> None:
    result = client.perturb(PROMPT)
    figure = result.plot(position=2)
    found = result.comparison()
    bars, moved, left = figure.axes[:3]
    widths = [cast("Rectangle", bar).get_width() for bar in bars.patches]
    pairs = np.nan_to_num([guess.probability for guess in found.guesses])
    np.testing.assert_array_equal(widths, pairs.T.reshape(-1))
    heights = [cast("Rectangle", bar).get_height() for bar in moved.patches]
    assert heights == list(found.kl_by_position)
    assert found.change is not None
    np.testing.assert_array_equal(
        pictured(left), np.maximum(found.change.grid(2).values, found.change.scale().low)
    )
    assert "L2 norm of the change, log scale" in written(figure)


def test_maps_stand_side_by_side_on_one_scale(client: Client) -> None:
    figure = client.trace(PROMPT, "Eiffel").plot()
    n_layers = ARCHITECTURE.n_layers
    values = restored(3 * n_layers)
    for at, axis in enumerate(figure.axes[:3]):
        np.testing.assert_array_equal(pictured(axis), values[at * n_layers : (at + 1) * n_layers])
        assert axis.get_images()[0].get_clim() == (0.0, 1.0)
    text = written(figure)
    for said in (
        "MLP, most 0.593 at layer 3",
        "attention, most 1 at layer 3",
        "indirect effect, probability",
        "1 ␣Eiffel",
    ):
        assert said in text


def test_recovery_is_pictured_around_zero_and_heads_have_rows_of_their_own(client: Client) -> None:
    result = client.patching(PROMPT, "x", sites=["head"])
    (heads,) = result.restoration().maps
    assert len(heads.components) == ARCHITECTURE.n_layers * ARCHITECTURE.n_heads
    assert heads.peak is not None
    assert (heads.peak.component, heads.peak.position) == (Component.head(3, 2), N_TOKENS - 1)
    low, high = result.plot().axes[0].get_images()[0].get_clim()
    assert -low == high


def test_the_size_of_weights_is_pictured_and_outliers_are_ringed(client: Client) -> None:
    result = client.scan_weights()
    axis = result.plot().axes[0]
    assert pictured(axis)[1, 2] == np.float32(size_of(Component.head(2, 1)))
    (rings,) = axis.collections
    np.testing.assert_array_equal(rings.get_offsets(), [[2, 1]])
    assert "blocks.2.mlp W_out[7, 1]" in written(result.plot())
    assert result.weights().outliers[0].z == -88.0


def test_every_head_is_in_the_copying_map_though_no_mlp_was_asked_for(client: Client) -> None:
    size, copying = client.scan_weights(layers=["blocks.0.attn"]).plot().axes[:2]
    assert pictured(size).shape == pictured(copying).shape == (3, 1)
    np.testing.assert_array_equal(pictured(copying)[:, 0], [-0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("layers", "empty"), [(["blocks.0.mlp"], (False, True)), (["embed"], (True, True))]
)
def test_a_map_of_weights_without_a_row_says_so(
    client: Client, layers: list[str], empty: tuple[bool, bool]
) -> None:
    figure = client.scan_weights(layers=layers).plot()
    figure.savefig(io.BytesIO())
    said = [NOTHING in [text.get_text() for text in axis.texts] for axis in figure.axes[:2]]
    assert tuple(said) == empty


@pytest.mark.parametrize("foil", [None, " Rome"])
def test_a_redacted_result_keeps_its_metric_and_its_guesses_apart(
    client: Client, foil: str | None
) -> None:
    def redacted(result: Result) -> Result:
        for name in result.table_names:
            result._tables[name] = redacted_table(result.table(name), SCAN_KEY)
        return result

    name = "log p(answer)" if foil is None else "logit(answer) - logit(foil)"
    lesion = redacted(client.perturb(PROMPT, foil=foil))
    compared = lesion.comparison()
    assert compared.metric_name == name
    assert len(compared.guesses) == 5
    assert compared.likeliest("before", 9) != compared.likeliest("after", 9)
    circuit = redacted(client.scan_circuits(PROMPT, foil=foil))
    assert circuit.circuit().question.metric == name
    patching = redacted(client.patching(PROMPT, "x", foil=foil))
    assert (patching.restoration().foil is None) == (foil is None)
    for result in (lesion, circuit, patching):
        result.plot().savefig(io.BytesIO())


def test_against_a_baseline_the_change_is_pictured(client: Client) -> None:
    result = client.scan_weights(baseline="tiny")
    assert "change from tiny" in written(result.plot())
    assert result.weights().relative_change is not None


def test_a_view_of_another_kind_of_scan_is_refused(client: Client) -> None:
    result = client.scan_weights()
    for view in (result.circuit, result.lens, result.comparison, result.restoration):
        with pytest.raises(ValueError, match="this T2 result has no table"):
            view()


def test_signed_values_are_blue_below_zero_and_orange_above_it_and_darkest_at_it() -> None:
    below, middle, above = (blue_orange(place) for place in (0.0, 0.5, 1.0))
    assert below.blue > below.red
    assert above.red > above.blue
    assert sum(middle) < min(sum(below), sum(above))
    scale = Scale.around_zero(np.array([-3, 1, np.nan], np.float32))
    assert scale.place(np.array([0], np.float32))[0] == 0.5
    assert Scale.around_zero(np.zeros(2, np.float32)) == Scale(-1.0, 1.0, logarithmic=False)
