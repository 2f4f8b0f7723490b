"""Laws of `MapForm`: which maps there are, and their names."""

import math

import pytest

from seerattn.selection.map_form import MASS, PUBLISHED, MapForm


@pytest.mark.parametrize(
    ("text", "form"),
    [("max:inf", PUBLISHED), ("sum:1", MASS), ("sum:2.5", MapForm("sum", 2.5)), ("max:1024", MapForm("max", 1024))],
)
def test_a_form_is_what_its_text_says(text: str, form: MapForm) -> None:
    assert MapForm.parse(text) == form and str(form) == text
    assert (form.keys, form.power) == (text[:3], float(text[4:]))


def test_a_power_that_is_a_whole_number_is_the_same_form_as_a_float() -> None:
    assert MapForm("sum", 2) == MapForm("sum", 2.0) and len({MapForm("sum", 2), MapForm("sum", 2.0)}) == 1


@pytest.mark.parametrize("power", [0, 0.99, -1, -math.inf, math.nan, 1025, 10**400, True, None, "2"])
def test_powers_that_no_map_has_are_rejected(power: object) -> None:
    with pytest.raises(ValueError, match=r"^power must be a number of 1 to 1024, or inf for the largest row, got "):
        MapForm("sum", power)


@pytest.mark.parametrize("keys", ["mean", "", None, ["sum"], 1])
def test_reductions_over_keys_that_no_map_has_are_rejected(keys: object) -> None:
    with pytest.raises(ValueError, match=r"^keys must be max or sum, got "):
        MapForm(keys, 2)


@pytest.mark.parametrize("text", ["", "sum", "sum:", "2:sum", "sum:two", "sum:2:3", "sum:0", "sum:nan", "x" * 1000])
def test_text_that_names_no_map_is_rejected_in_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a map must be keys:power such as sum:2 or max:inf, got .{,200}$"):
        MapForm.parse(text)
