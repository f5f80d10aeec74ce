"""The models that are merged on the pretend device, where every operation takes long: two layers are enough."""

import pytest
from models import Family, make_family


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> dict[str, Family]:
    return {"llama": make_family("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=2)}
