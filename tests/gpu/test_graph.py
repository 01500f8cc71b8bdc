"""Look-up, gather and remap inside of a CUDA graph do in each replay what the reference makes of the new input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.visits import Visits
from vllm_moecxl.data.devices.cuda import CudaBackend

_VISIT_COUNT = 300


@pytest.fixture
def visits() -> Iterator[Visits]:
    device = torch.device("cuda", torch.cuda.current_device())
    backend = CudaBackend(device)
    yield Visits(backend, device)
    torch.cuda.synchronize(device)
    backend._end()


def test_visits_outside_of_a_graph(visits: Visits) -> None:
    for _ in range(_VISIT_COUNT):
        visits.change()
        visits.visit(visits.work)


def test_a_graph_that_was_captured_once_serves_whatever_input_it_finds(visits: Visits) -> None:
    visits.change()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, which a capture does not allow
        visits.visit(visits.work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        visits.work()
    for _ in range(_VISIT_COUNT):
        visits.change()
        visits.visit(graph.replay)


def test_two_graphs_of_a_layer_and_calls_between_them_share_its_slots(visits: Visits) -> None:
    """As vLLM captures one graph for each batch size, and runs what is larger without."""
    visits.change()
    visits.visit(visits.work)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            visits.work()
    for turn in range(_VISIT_COUNT):
        visits.change()
        visits.visit([graphs[0].replay, visits.work, graphs[1].replay][turn % 3])
