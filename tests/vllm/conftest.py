from pathlib import Path

import pytest

from .rigs import tiny_models
from .rigs.transformers_oracle import TransformersOracle


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def other_moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return tiny_models.make_moe(tmp_path_factory.mktemp("other_moe"), seed=1)


@pytest.fixture(scope="session")
def updated_moe_model(tmp_path_factory: pytest.TempPathFactory, moe_model: Path) -> Path:
    """The weights of `moe_model` but for the routers'."""
    return tiny_models.make_other_routers(tmp_path_factory.mktemp("updated_moe"), moe_model)


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def oracle(moe_model: Path) -> TransformersOracle:
    return TransformersOracle(moe_model)
