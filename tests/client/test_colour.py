"""Colours say what the numbers say: nothing reversed, nothing drowned by a sink."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps

from neural_mri.client.colour import Scale, inferno

finite = st.floats(min_value=2**-20, max_value=2**20, width=32)


def lightness(colour: tuple[int, int, int]) -> float:
    """CIE L* of an sRGB colour."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour)
    ]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return float(116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y)


def test_hotter_is_always_lighter() -> None:
    ramp = [lightness(inferno(place)) for place in np.linspace(0, 1, 200)]
    assert all(after > before for before, after in pairwise(ramp))


def test_the_coldest_colour_is_seen_on_a_dark_background() -> None:
    assert lightness(inferno(0)) > lightness((0x0A, 0x0C, 0x10)) + 12


@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.5, 0.82, 1.0])
def test_the_map_is_matplotlibs_inferno_without_its_black_end(place: float) -> None:
    red, green, blue, _ = colormaps["inferno"](0.2 + 0.8 * place)
    np.testing.assert_allclose(np.array((red, green, blue)) * 255, inferno(place), atol=8)


def test_a_sink_left_in_moves_the_limits_little() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 1, (100, 50)).astype(np.float32)
    values[:, 0] *= 1000  # 2 % of the values: the very share that the limits cut off
    scale = Scale.of(values, logarithmic=True)
    places = scale.place(values[:, 1:])
    assert np.mean((places > 0.05) & (places < 0.95)) > 0.6


def test_many_small_values_do_not_push_a_few_large_ones_off_the_scale() -> None:
    rng = np.random.default_rng(0)
    heads, mlps = rng.lognormal(0, 0.5, 2700), rng.lognormal(4, 0.5, 300)
    scale = Scale.of(heads.astype(np.float32), mlps.astype(np.float32), logarithmic=True)
    for group in (heads, mlps):
        places = scale.place(group.astype(np.float32))
        assert np.mean((places > 0.0) & (places < 1.0)) > 0.9


@given(numbers=st.lists(finite, min_size=1), logarithmic=st.booleans())
def test_places_lie_between_0_and_1_in_the_order_of_the_values(
    *, numbers: list[float], logarithmic: bool
) -> None:
    values = np.sort(np.array(numbers, dtype=np.float32))
    places = Scale.of(values, logarithmic=logarithmic).place(values)
    assert np.all((places >= 0) & (places <= 1))
    assert np.all(np.diff(places) >= 0)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_what_was_not_measured_has_no_place_and_moves_no_limit(*, logarithmic: bool) -> None:
    values = np.array([1, 2, 4, np.nan, np.inf], dtype=np.float32)
    scale = Scale.of(values, logarithmic=logarithmic)
    assert 1 <= scale.low < scale.high <= 4
    assert np.isnan(scale.place(values)[3])


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("numbers", [[], [np.nan], [3.0], [3.0, 3.0]])
def test_there_are_limits_even_where_there_is_little_to_limit(
    *, numbers: list[float], logarithmic: bool
) -> None:
    scale = Scale.of(np.array(numbers, dtype=np.float32), logarithmic=logarithmic)
    assert scale.low < scale.high


def test_zero_has_the_lowest_place_on_a_logarithmic_scale() -> None:
    scale = Scale.of(np.array([1, 10, 100], dtype=np.float32), logarithmic=True)
    assert scale.place(np.array([0], dtype=np.float32)).tolist() == [0.0]
