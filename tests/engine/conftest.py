"""Engines run in this process, one after the other; the environment has to stand before vLLM is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # a further engine then costs a second instead of half a minute
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
_EQUALITY = pytest.StashKey[list[tuple[str, bool]]]()


@pytest.fixture(scope="session")
def fixture_model() -> str:
    """The trained mixtral-tiny."""
    return str(FIXTURES / "mixtral-tiny")


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    return FIXTURES / "mixtral-tiny"


@pytest.fixture(scope="session")
def equality(request: pytest.FixtureRequest) -> list[tuple[str, bool]]:
    """Collects (combination, equal) for the line that the run ends with."""
    return request.config.stash.setdefault(_EQUALITY, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(_EQUALITY, [])
    if results:
        equal = sum(is_equal for _, is_equal in results)
        terminalreporter.section("equality with unmodified vLLM")
        for name, is_equal in results:
            if not is_equal:
                terminalreporter.line(f"DIFFERENT: {name}")
        terminalreporter.line(f"{equal} of {len(results)} combinations equal, tokens and logprobs to the last bit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A whole engine warns of its own affairs; only warnings that our code raises stay errors here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.filterwarnings("error:::vllm_moecxl"))
            item.add_marker(pytest.mark.engine)
