"""Byte quantities: what people may write, and what they get to read."""

import pytest

from vllm_moecxl.units import GIB, KIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("512 MB", 512 * 10**6),
        ("  1.5 kib ", 1536),
        ("7b", 7),
        ("2T", 2 * 10**12),
        ("1TiB", 1 << 40),
        ("3g", 3 * 10**9),
        ("0MiB", 0),
    ],
)
def test_a_number_with_a_unit_is_read_whatever_its_case_and_spacing(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "1 GiB 2", "1,5GiB", "1e3MiB", "24GiBs", "24 XB", ".5GiB"])
def test_anything_else_is_not_a_quantity(text: str) -> None:
    assert parse_bytes(text) is None


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (1536 * KIB, "1.50 MiB"),
        (MIB, "1.00 MiB"),
        (24 * GIB, "24.00 GiB"),
        (3 << 40, "3.00 TiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_leaves_a_digit_before_the_point(count: int, expected: str) -> None:
    assert format_bytes(count) == expected
