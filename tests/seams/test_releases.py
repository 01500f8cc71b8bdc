"""Every supported vLLM still has what our integration relies on; a failure names all that a release has changed."""

from __future__ import annotations

import pytest

from tests.seams.conftest import RELEASES, fetched_source, installed_source, version_of
from tests.seams.contract import broken
from tests.seams.table import SEAMS
from vllm_moecxl.config import is_supported_vllm


def test_the_installed_vllm_keeps_every_seam() -> None:
    source = installed_source()
    version = version_of(source)
    assert is_supported_vllm(version)
    if failure := broken(source, f"{version} (installed)", SEAMS):
        pytest.fail(failure, pytrace=False)


@pytest.mark.parametrize("version", RELEASES)
def test_the_cuda_wheel_keeps_every_seam(version: str) -> None:
    source = fetched_source(version)
    assert version_of(source) == version
    if failure := broken(source, f"{version} (CUDA wheel)", SEAMS):
        pytest.fail(failure, pytrace=False)
