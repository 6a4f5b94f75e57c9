"""Weights that growth refuses."""

import pytest
import torch
from com_pt_tiny import clip

from com_pt.errors import GrowthError
from com_pt.method.growth import check_weights
from effml_common.errors import InputError


def test_a_quantised_source_is_refused_and_a_nan_in_given_weights_is_bad_input() -> None:
    state = clip(32).state_dict()
    check_weights(state)
    name = "visual.conv1.weight"
    with pytest.raises(GrowthError, match=f"{name} is torch.int8; grow from an unquantised"):
        check_weights({**state, name: (state[name] * 100).to(torch.int8)})
    with pytest.raises(InputError, match="holds NaN or infinity; use an earlier checkpoint"):
        check_weights({**state, name: state[name] * float("inf")})
