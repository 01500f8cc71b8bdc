"""`--moe-offload-config`: every key, what it takes and what it refuses."""

from typing import Any

import pytest

from vllm_moecxl.config import EVICTIONS, PREDICTORS, BankSpec, OffloadConfig, SlotSpec
from vllm_moecxl.control.eviction import POLICIES
from vllm_moecxl.control.prediction import PREDICTORS as FACTORIES
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.units import GIB, MIB


def parse(**options: Any) -> OffloadConfig:
    return OffloadConfig.parse({"mode": "cxl", **options})


def test_without_options_offloading_is_off() -> None:
    assert OffloadConfig.parse({}) == OffloadConfig()
    assert OffloadConfig.parse({}).mode == "off"


def test_mode_alone_gives_the_defaults() -> None:
    assert parse() == OffloadConfig(mode="cxl")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("auto", SlotSpec()),
        (" auto ", SlotSpec()),
        ("25%", SlotSpec(share=0.25)),
        ("12.5 %", SlotSpec(share=0.125)),
        ("100%", SlotSpec(share=1.0)),
        (16, SlotSpec(count=16)),
        ("16", SlotSpec(count=16)),
        ("24GiB", SlotSpec(total_bytes=24 * GIB)),
        ("1.5 MiB", SlotSpec(total_bytes=3 * MIB // 2)),
    ],
)
def test_slots_take_auto_a_share_a_count_or_bytes(raw: object, expected: SlotSpec) -> None:
    config = parse(slots=raw)
    assert config.slots == expected
    assert config.slots.is_auto == (expected == SlotSpec())
    assert config.slots_text == raw


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("slots", raw) for raw in (0, -1, True, False, 2.0, None, [], {}, "", "0", "-3", "%", "x%", "0%", "-5%")),
        *(("slots", raw) for raw in ("100.1%", "nan%", "inf%", "0GiB", "1 XB", "GiB", "1.5", "all")),
        *(("banks", raw) for raw in ([], (), {}, None, 1, True, [1], [None], [["dram"]], [""], ["auto"], ["cxl"])),
        *(("banks", raw) for raw in (["dram="], ["dram=0GiB"], ["dram=64"], ["dram=x"], ["dram", "dram=1GiB"])),
        *(("banks", raw) for raw in (["dram:"], ["dram:0"], ["numa"], ["numa:"], ["numa:x"], ["numa:-1"])),
        ("banks", ["numa:0x1"]),
        *(("banks", raw) for raw in (["numa:1="], ["numa:1=5"], ["numa:99999"], ["numa:1", "numa:01"], ["Numa:1"])),
        *(("banks", raw) for raw in (["file:"], ["file"], ["file:a\0b"], ["file:a", "file:b"], ["dax:"], ["dax:\0"])),
        *(("banks", raw) for raw in (["emulated:"], ["emulated"], ["=1GiB"], [":"], ["nvme:/x"], ["dram = 64GiB"])),
        *(("stripe", raw) for raw in ("Auto", "", None, True, False, 1, "tier", ["all"])),
        *(("verify", raw) for raw in ("on", "", None, True, False, "Load")),
        *(("placement_trace", raw) for raw in ("", 1, True, False, ["a"], "a\0b")),
        *(("pack_to", raw) for raw in ("", 1, True, ["a"], "a\0b")),
        *(("eviction", raw) for raw in ("fifo", "LRU", "", None, True, ["lru"])),
        *(("passes", raw) for raw in ("slow", "Exact", None, True, 1)),
        *(("layer_buffer", raw) for raw in (0, 1, "true", "yes", None, 1.0)),
        *(("strict_placement", raw) for raw in (0, 1, "true", "yes", "auto", None, 1.0)),
        *(("in_place", raw) for raw in (True, False, "Auto", "yes", "", None, 1, ["auto"])),
        *(("lookup", raw) for raw in ("Device", "gpu", "", None, True, False, 1, ["device"])),
        *(("sidecar", raw) for raw in (0, 1, "true", "auto", None, 1.0, [])),
        *(("prefetch", raw) for raw in ("on", "Auto", "", True, False, None, 1, {}, [], (), [1], [None], ["gates"])),
        *(("prefetch", raw) for raw in (["auto"], ["off"], ["gate", "off"], [["gate"]], {"gate": 1}, "gate,tokens")),
        *(("trace", raw) for raw in ("", 1, True, False, ["a"], "a\0b")),
        *(("mode", raw) for raw in ("on", "CXL", True, False, None, 1)),
    ],
)
def test_a_bad_value_is_refused_with_the_option_the_value_and_a_remedy(option: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(**{option: value})
    sentence = str(refusal.value)
    assert sentence.startswith(f"--moe-offload-config: {option}=")
    told = value[0] if option == "banks" and isinstance(value, list | tuple) and len(value) == 1 else value
    assert repr(told) in sentence
    assert sentence.partition("is not possible: ")[2], "no remedy"


def test_a_bank_takes_an_optional_capacity() -> None:
    assert parse(banks="auto").banks is None is parse().banks
    assert parse(banks=["dram"]).banks == parse(banks="dram").banks == (BankSpec("dram"),)
    assert parse(banks=("dram=64GiB",)).banks == (BankSpec("dram", "", 64 * GIB),)


@pytest.mark.parametrize(
    ("raw", "expected", "name"),
    [
        ("dram", BankSpec("dram"), "dram"),
        ("numa:1", BankSpec("numa", "1"), "numa:1"),
        ("numa:01=256GiB", BankSpec("numa", "1", 256 * GIB), "numa:1"),
        ("dax:/dev/dax0.0", BankSpec("dax", "/dev/dax0.0"), "dax:/dev/dax0.0"),
        ("dax:/dev/dax0.0=1TiB", BankSpec("dax", "/dev/dax0.0", 1024 * GIB), "dax:/dev/dax0.0"),
        ("file:/nvme/model.slabs", BankSpec("file", "/nvme/model.slabs"), "file:/nvme/model.slabs"),
        ("file:/nvme/a=1GiB:b", BankSpec("file", "/nvme/a=1GiB:b"), "file:/nvme/a=1GiB:b"),
        ("emulated:cxl-d=64GiB", BankSpec("emulated", "cxl-d", 64 * GIB), "emulated:cxl-d"),
        ("emulated:300ns,2GB/s", BankSpec("emulated", "300ns,2GB/s"), "emulated:300ns,2GB/s"),
    ],
)
def test_each_kind_of_bank_has_its_spec(raw: str, expected: BankSpec, name: str) -> None:
    assert BankSpec.parse(raw) == expected
    assert expected.name == name


@pytest.mark.parametrize(
    ("option", "values", "default"),
    [
        ("stripe", ["auto", "never", "all"], "auto"),
        ("verify", ["off", "load", "fetch"], "load"),
        ("placement_trace", [None, "traces/a.npz"], None),
        ("pack_to", [None, "/nvme/a.slabs"], None),
        ("strict_placement", [True, False], False),
        ("in_place", ["auto", "never", "always"], "auto"),
        ("lookup", ["auto", "host", "device"], "auto"),
        ("sidecar", [True, False], True),
        ("prefetch", ["auto", "off"], "auto"),
        ("trace", [None, "traces/a.npz"], None),
    ],
)
def test_an_option_takes_its_values(option: str, values: list[object], default: object) -> None:
    assert [getattr(parse(**{option: value}), option) for value in values] == values
    assert getattr(parse(), option) == default


@pytest.mark.parametrize(
    "raw", ["9" * 5000, "9" * 5000 + "GiB", "0." + "9" * 5000 + "GiB", "1" * 400 + "TiB", "9" * 5000 + "%"]
)
def test_an_endless_number_is_a_bad_value_like_any_other(raw: str) -> None:
    with pytest.raises(ConfigError):
        SlotSpec.parse(raw)
    with pytest.raises(ConfigError):
        BankSpec.parse(f"dram={raw}")


def test_a_key_that_is_no_text_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"unknown option\(s\) 1, None"):
        parse(**{"slots": "25%"}) and OffloadConfig.parse({1: 2, None: 3})  # type: ignore[dict-item]


def test_every_eviction_policy_that_exists_can_be_chosen() -> None:
    assert tuple(POLICIES) == EVICTIONS
    assert [parse(eviction=name).eviction for name in POLICIES] == list(POLICIES)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("gate", ("gate",)),
        (["gate"], ("gate",)),
        (("tokens", "gate"), ("tokens", "gate")),
        (["gate", "tokens", "gate"], ("gate", "tokens")),
    ],
)
def test_predictors_are_chosen_by_name_each_once_in_the_order_given(raw: object, expected: tuple[str, ...]) -> None:
    assert parse(prefetch=raw).prefetch == expected


def test_every_predictor_that_exists_can_be_chosen() -> None:
    assert set(FACTORIES) == set(PREDICTORS)
    assert [parse(prefetch=name).prefetch for name in FACTORIES] == [(name,) for name in FACTORIES]


def test_predictors_that_nobody_would_ask_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefetch=\['gate'\] is not possible: the sidecar prefetches, and it is"):
        parse(prefetch=["gate"], sidecar=False)
    assert parse(prefetch="auto", sidecar=False).prefetch == "auto"
    assert parse(prefetch="off", sidecar=False).prefetch == "off"


@pytest.mark.parametrize("value", ["exact", "fast"])
def test_passes_takes_its_values(value: str) -> None:
    assert parse(passes=value).passes == value


@pytest.mark.parametrize("value", ["auto", True, False])
def test_layer_buffer_takes_its_values(value: object) -> None:
    assert parse(layer_buffer=value).layer_buffer is value


@pytest.mark.parametrize("mode", ["cxl", "off"])
def test_unknown_options_are_named_together_with_the_known_ones(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown option\(s\) slot, zeta; .*knows banks, .*mode, .*slots, .*verify$"):
        OffloadConfig.parse({"mode": mode, "zeta": 1, "slot": 8})


def test_the_raw_text_of_slots_is_not_an_option() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        parse(slots_text="25%")


@pytest.mark.parametrize("mode", [{}, {"mode": "off"}])
def test_options_without_offloading_are_refused(mode: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="sets passes, slots but --moe-offload is off: add --moe-offload cxl"):
        OffloadConfig.parse({**mode, "slots": "25%", "passes": "fast"})


@pytest.mark.parametrize(
    ("raw", "expert_count", "topk", "expected"),
    [
        (4, 8, 2, 4),
        (2, 8, 2, 2),
        (8, 8, 2, 8),
        ("25%", 8, 2, 2),
        ("26%", 8, 2, 3),
        ("7%", 100, 7, 7),
        ("100%", 7, 2, 7),
        ("0.1%", 8, 1, 1),
        ("33%", 3, 1, 1),
    ],
)
def test_a_share_is_rounded_up_to_whole_slots(raw: object, expert_count: int, topk: int, expected: int) -> None:
    assert SlotSpec.parse(raw).count_for(expert_count, topk, raw) == expected


@pytest.mark.parametrize("expert_count", [3, 8, 60, 128, 257])
@pytest.mark.parametrize("topk", [2, 3])
@pytest.mark.parametrize("as_share", [True, False])
def test_the_least_that_a_refusal_names_is_accepted(expert_count: int, topk: int, *, as_share: bool) -> None:
    too_little = "0.01%" if as_share else topk - 1
    spec = SlotSpec(share=0.0001) if as_share else SlotSpec(count=topk - 1)
    with pytest.raises(ConfigError, match=rf"needs {topk} experts of {expert_count} at once") as refusal:
        spec.count_for(expert_count, topk, too_little)
    least = str(refusal.value).rpartition(" ")[2]
    assert SlotSpec.parse(least).count_for(expert_count, topk, least) >= topk


def test_more_slots_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'slots=9 .*only 8 experts, use at most 8 or "100%"'):
        SlotSpec(count=9).count_for(8, 2, 9)
