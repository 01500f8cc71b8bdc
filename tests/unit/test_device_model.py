"""The emulated memory device: its bandwidth, its queue, its tail, what several of them share. No clock runs here."""

import statistics

import pytest

from vllm_moecxl.control.device_model import PRESETS, DeviceModel, DeviceSpec, Upstream
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.units import GIB, MIB

#: 1 us, 1 GB/s in, 0.5 GB/s out, no tail.
PLAIN = DeviceSpec(1e-6, 1e9, 0.5e9)
#: A fifth of the requests takes longer, by 10 us in the mean.
TAILED = DeviceSpec(1e-6, 1e9, 1e9, tail_share=0.2, tail_s_mean=10e-6)


def device(spec: DeviceSpec = PLAIN, *, seed: int = 1, upstream: Upstream | None = None) -> DeviceModel:
    return DeviceModel(spec, seed=seed, upstream=upstream)


@pytest.mark.parametrize(("write", "expected_s"), [(False, 1e-3 + 1e-6), (True, 2e-3 + 1e-6)])
def test_an_idle_device_takes_its_latency_and_the_transfer(write: bool, expected_s: float) -> None:
    assert device().submit(5.0, 10**6, write) == pytest.approx(5.0 + expected_s)


@pytest.mark.parametrize(("write", "bytes_per_s"), [(False, 1e9), (True, 0.5e9)])
def test_requests_one_after_another_move_at_the_bandwidth(write: bool, bytes_per_s: float) -> None:
    model, now_s = device(), 0.0
    for _ in range(100):
        now_s = model.submit(now_s, 4 * MIB, write)
    assert 400 * MIB / now_s == pytest.approx(bytes_per_s, rel=0.001)


def test_two_streams_at_once_share_the_bandwidth_equally() -> None:
    model = device()
    done_s, moved = [0.0, 0.0], [0, 0]
    while max(done_s) < 1.0:
        stream = done_s.index(min(done_s))
        done_s[stream] = model.submit(done_s[stream], MIB)
        moved[stream] += MIB
    assert sum(moved) / max(done_s) == pytest.approx(1e9, rel=0.01)
    assert moved[0] == pytest.approx(moved[1], rel=0.01)


def test_reads_and_writes_wait_for_each_other() -> None:
    model = device()
    model.submit(0.0, 10**6, write=True)
    assert model.submit(0.0, 10**6) == pytest.approx(3e-3 + 1e-6)


def test_latency_grows_with_load() -> None:
    """A request every 1.25, 1 or 0.8 transfer times: the queue stays empty, stays short, or keeps growing."""
    waits = {}
    for load in (0.8, 1.0, 1.25):
        model = device()
        waits[load] = [model.submit(i * 1e-3 / load, 10**6) - i * 1e-3 / load for i in range(100)]
    assert waits[0.8] == pytest.approx([1e-3 + 1e-6] * 100)
    assert waits[1.0] == pytest.approx([1e-3 + 1e-6] * 100)
    assert waits[1.25] == sorted(waits[1.25]) and waits[1.25][-1] == pytest.approx(1e-3 + 1e-6 + 99 * 0.2e-3)


def test_requests_in_a_queue_pay_the_latency_once_together() -> None:
    model = device()
    assert [model.submit(0.0, 10**3) for _ in range(3)] == pytest.approx([2e-6, 3e-6, 4e-6])


def test_an_idle_time_is_not_saved_up() -> None:
    model = device()
    model.submit(0.0, 10**6)
    assert model.submit(60.0, 10**6) == pytest.approx(60.0 + 1e-3 + 1e-6)


def test_a_tail_of_the_declared_weight_and_length() -> None:
    model = device(TAILED)
    excess_s = [model.submit(float(i), 0) - i - 1e-6 for i in range(4000)]
    late_s = [excess for excess in excess_s if excess > 1e-9]
    assert len(late_s) / 4000 == pytest.approx(0.2, abs=0.03)
    assert statistics.fmean(late_s) == pytest.approx(10e-6, rel=0.1)
    assert statistics.stdev(late_s) == pytest.approx(10e-6, rel=0.1)
    assert min(excess_s) == pytest.approx(0, abs=1e-9)


def test_a_tail_delays_its_own_request_only() -> None:
    model = device(TAILED)
    completions_s = [model.submit(0.0, 1000) for _ in range(200)]
    assert min(completions_s[100:]) < max(completions_s[:100])
    assert model.submit(0.0, 1000) < 201e-6 + 1e-3, "the queue moves on at the bandwidth"


def test_the_seed_decides() -> None:
    def completions(seed: int) -> list[float]:
        model = device(TAILED, seed=seed)
        return [model.submit(0.0, 1000) for _ in range(50)]

    assert completions(3) == completions(3) != completions(4)


@pytest.mark.parametrize(("cap", "expected"), [(1.5e9, 1.5e9), (2e9, 2e9), (10e9, 2e9)])
def test_devices_together_move_no_more_than_their_upstream_carries(cap: float, expected: float) -> None:
    upstream = Upstream(cap)
    devices = [device(upstream=upstream) for _ in range(2)]
    last_s = max(model.submit(0.0, MIB) for _ in range(200) for model in devices)
    assert 400 * MIB / last_s == pytest.approx(expected, rel=0.01)


def test_a_device_alone_is_not_slowed_by_a_wider_upstream() -> None:
    assert device(upstream=Upstream(2e9)).submit(0.0, 10**6) == device().submit(0.0, 10**6)


def test_an_upstream_that_is_behind_holds_its_device_up() -> None:
    upstream = Upstream(1e9)
    first, second = (device(upstream=upstream) for _ in range(2))
    first.submit(0.0, 10**6)
    assert second.submit(0.0, 10**6) == pytest.approx(2e-3 + 1e-6)
    assert second.submit(0.0, 0) == pytest.approx(2e-3 + 1e-6)


@pytest.mark.parametrize(
    ("name", "latency_s", "bytes_per_s", "capacity_bytes"),
    [
        ("cxl-a", 214e-9, 32e9, None),
        ("cxl-b", 239e-9, 26e9, None),
        ("cxl-c", 394e-9, 18e9, 16 * 10**9),
        ("cxl-d", 271e-9, 52e9, None),
    ],
)
def test_the_presets_are_the_papers_devices(
    name: str, latency_s: float, bytes_per_s: float, capacity_bytes: int | None
) -> None:
    spec = DeviceSpec.parse(name)
    assert spec is PRESETS[name]
    assert (spec.latency_s, spec.read_bytes_per_s, spec.capacity_bytes) == (latency_s, bytes_per_s, capacity_bytes)
    assert spec.tail_share > 0 and spec.tail_s_mean > spec.latency_s


@pytest.mark.parametrize(
    ("text", "latency_s", "read", "write"),
    [
        ("300ns,2GB/s", 300e-9, 2e9, 2e9),
        (" 1.5us , 500 MB/s ", 1.5e-6, 500e6, 500e6),
        ("0.2ms,1GiB/s,256MB/s", 0.2e-3, GIB, 256e6),
        ("1s,7B/ s", 1.0, 7, 7),
    ],
)
def test_a_custom_device_is_a_latency_and_one_or_two_bandwidths(
    text: str, latency_s: float, read: float, write: float
) -> None:
    spec = DeviceSpec.parse(text)
    assert (spec.latency_s, spec.read_bytes_per_s, spec.write_bytes_per_s) == (pytest.approx(latency_s), read, write)
    assert spec.tail_share > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cxl-e",
        "300ns",
        "2GB/s",
        "2GB/s,300ns",
        "300,2GB/s",
        "300ns,2GB",
        "300ns,2",
        "300ns,0GB/s",
        "-1ns,2GB/s",
        "300ns,2GB/h",
        "300ns,",
        "300ns,2GB/s,",
        "300ns,2GB/s,1GB/s,1GB/s",
        "1e3ns,2GB/s",
        "300 parsec,2GB/s",
        "inf,inf",
    ],
)
def test_anything_else_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ConfigError, match='such as "emulated:300ns,2GB/s"') as refused:
        DeviceSpec.parse(text)
    assert f"banks=['emulated:{text}']" in str(refused.value) and "cxl-a, cxl-b, cxl-c, cxl-d" in str(refused.value)
