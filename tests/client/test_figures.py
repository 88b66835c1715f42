"""Pictures are drawn for every kind of scan, with units and without the sink's glare."""

import io
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread
from matplotlib.text import Text

from neural_mri.client import Client
from neural_mri.client.drawing import NOTHING
from neural_mri.client.text import visible


def texts_of(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    return cast("list[Text]", figure.findobj(Text))


def labels(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def image_of(axis: Axes) -> AxesImage:
    (image,) = axis.get_images()
    return image


def test_an_activation_picture_names_layers_components_tokens_and_unit(client: Client) -> None:
    written = labels(client.scan_activation("a").plot())
    for expected in ("layer", "H2", "MLP", "4 ␣in", "0 The *", "L2 norm", "log scale", "sinks"):
        assert expected in written


def test_the_picture_shows_the_numbers_of_the_scan(client: Client) -> None:
    result = client.scan_activation("a")
    shown = image_of(result.plot(position=2).axes[0]).get_array()
    scale = result.activations().scale()
    expected = result.activations().grid(position=2).values
    np.testing.assert_allclose(np.asarray(shown), np.maximum(expected, scale.low))


def test_the_colour_limits_are_those_without_the_sink(client: Client) -> None:
    result = client.scan_activation("a")
    scale = result.activations().scale()
    for axis in result.plot().axes[:3]:
        assert image_of(axis).get_clim() == pytest.approx((scale.low, scale.high))


def test_structure_is_drawn_in_greys(client: Client) -> None:
    figure = client.scan_structural().plot()
    assert "parameters" in labels(figure)
    colours = image_of(figure.axes[0]).cmap(np.linspace(0, 1, 5))[:, :3]
    assert np.ptp(colours, axis=1).max() < 0.05


def test_attention_is_drawn_a_square_a_head(client: Client) -> None:
    figure = client.scan_attention("a", layers=[2]).plot()
    squares = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_title("left") for axis in squares] == ["H0", "H1", "H2"]
    assert "attention probability" in labels(figure)


def test_a_picture_is_not_kept_by_pyplot_and_shows_itself_in_a_notebook(client: Client) -> None:
    figure = client.scan_activation("a").plot(scale="linear")
    assert plt.get_fignums() == []
    png = figure._repr_png_()  # type: ignore[attr-defined]
    assert imread(io.BytesIO(png)).shape[2] == 4


@pytest.mark.parametrize("name", ["picture.png", "picture.svg", "picture.pdf"])
def test_a_picture_can_be_saved(client: Client, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    client.scan_activation(
        "a", layers=["blocks.1.attn.head_2"], token_positions=[0]
    ).plot().savefig(path)
    assert path.stat().st_size > 1000


def test_a_character_without_a_glyph_is_a_box_and_no_warning(client: Client) -> None:
    result = client.scan_attention("a", layers=[0])
    tokens = ("The", " 한국", " 🧠", " \u202e", "")
    result.manifest = msgspec.structs.replace(result.manifest, prompt_tokens=tokens)
    figure = result.plot()
    figure.savefig(io.BytesIO())
    assert "2 ␣□" in labels(figure)
    assert "4 ∅" in labels(figure)


def test_dollars_and_backslashes_are_drawn_as_they_stand(client: Client) -> None:
    result = client.scan_attention("a", layers=[0])
    tokens = ("$$", r" \$x^{$", "It", " cost $20 and he got $5", " back")
    result.manifest = msgspec.structs.replace(result.manifest, prompt_tokens=tokens)
    figure = result.plot()
    for form in ("png", "svg"):
        figure.savefig(io.BytesIO(), format=form)
    shown = {text.get_text(): text.get_parse_math() for text in texts_of(figure)}
    for expected in ("0 $$", r"1 ␣\$x^{$", "3 ␣cost␣$20␣and␣he␣got␣$5"):
        assert shown[expected] is False


def test_a_bar_of_less_than_a_decade_has_numbers_and_no_formulas(client: Client) -> None:
    figure = client.scan_structural().plot()
    written = [text for text in labels(figure).splitlines() if text]
    assert not [text for text in written if "$" in text]
    assert [text for text in written if text.replace(",", "").isdecimal() and len(text) > 3]


@pytest.mark.parametrize("layers", [["embed"], ["blocks.0.resid_post"]])
def test_a_scan_of_which_nothing_lies_on_the_grid_says_so(
    client: Client, layers: list[str]
) -> None:
    figure = client.scan_activation("a", layers=layers).plot()
    assert NOTHING in labels(figure)
    # Nor are there limits of colours where there are none.
    assert len(figure.axes) == sum(
        NOTHING in [text.get_text() for text in axis.texts] for axis in figure.axes
    )


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "␣Paris"),
        ("\n\n", "⏎⏎"),
        ("", "∅"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202e", "\\u202e"),
        ("한국어", "한국어"),
        ("\ud83e", "\\ud83e"),
    ],
)
def test_tokens_are_shown_so_that_they_cannot_act(token: str, shown: str) -> None:
    assert visible(token) == shown
