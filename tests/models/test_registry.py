"""Which architectures are supported, and what an unknown one is told."""

import pytest

from jaxserve.errors import WeightError
from jaxserve.models.registry import FAMILIES, family_for


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
        ("Qwen2_5_VLForConditionalGeneration", "Qwen2ForCausalLM"),
        ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_supported_one(unknown, nearest):
    with pytest.raises(WeightError) as caught:
        family_for({"architectures": [unknown]})
    refused, supported = str(caught.value).split("; supported: ")
    assert unknown in refused
    assert nearest in supported.split(", ")


@pytest.mark.parametrize("names", [[], ["???"]])
def test_where_none_is_near_all_are_named(names):
    with pytest.raises(WeightError) as caught:
        family_for({"architectures": names})
    assert str(caught.value).endswith(f"supported: {', '.join(FAMILIES)}")


def test_any_supported_name_of_several_is_taken():
    names = ["Unknown", "Qwen3ForCausalLM"]
    assert family_for({"architectures": names}) is FAMILIES["Qwen3ForCausalLM"]
