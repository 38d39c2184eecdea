from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_rollout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a small model and of a rollout with routes that no router chose."""
    from tests.examples.small_rollout import make_small_rollout

    return make_small_rollout(tmp_path_factory.mktemp("small"), 8)
