from pathlib import Path

import pytest

from neural_mri.contract.suites import Suite
from neural_mri.diagnostics import Record
from tests.diagnostics.making import measured, saved, tiny_suite


@pytest.fixture(scope="session")
def suite() -> Suite:
    return tiny_suite()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("tiny") / "main")


@pytest.fixture(scope="session")
def baseline(suite: Suite, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The tiny model's record, its noise measured."""
    return measured(suite, tiny_folder, tmp_path_factory.mktemp("store"), with_noise=True)


@pytest.fixture(scope="session")
def candidate(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Another model of the same shape: everything differs."""
    folder = saved("llama", tmp_path_factory.mktemp("other") / "other", seed=1)
    return measured(suite, folder, tmp_path_factory.mktemp("store"))
