"""Cards of gates: what they call a model."""

import pytest

from seerattn.training.card import model_name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Meta-Llama-3-8B", "Meta-Llama-3-8B"),
        ("assets/reference-model", "reference-model"),
        ("runs/longer/model", "longer"),
        ("model", "model"),
        ("", ""),
    ],
)
def test_a_card_calls_a_fine_tuned_model_by_the_folder_of_its_run(model: str, name: str) -> None:
    assert model_name(model) == name
