import pytest

from moe_offload.errors import ConfigError
from moe_offload.offload.planning.sizes import format_size, parse_rate, parse_size

GIB = 1024**3
MIB = 1024**2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * GIB),
        ("6 GiB", 6 * GIB),
        (" 6gib ", 6 * GIB),
        ("6 GB", 6_000_000_000),
        ("1.5g", 3 * GIB // 2),
        ("1.5G", 3 * GIB // 2),
        ("512MiB", 512 * MIB),
        ("512mb", 512_000_000),
        ("64k", 65536),
        (".5T", 512 * GIB),
        ("123", 123),
        ("123b", 123),
        (4096, 4096),
        ("80%", 8000),
        ("12.5 %", 1250),
        ("100%", 10000),
        ("auto", 7000),
        ("AUTO", 7000),
    ],
)
def test_parses_what_people_write(text, expected):
    assert parse_size(text, total_bytes=10_000, free_bytes=7_000) == expected


def test_auto_leaves_the_margin_and_never_goes_below_zero():
    assert parse_size("auto", total_bytes=100, free_bytes=70, margin_bytes=30) == 40
    assert parse_size("auto", total_bytes=100, free_bytes=20, margin_bytes=30) == 0


@pytest.mark.parametrize(
    "size",
    ["", "six", "6XB", "6 Gi B", "-1GiB", "0", 0, -5, "0%", "101%", "1e9", "1,5GiB", "%", "nan", True, 2.5, None],
)
def test_refuses_anything_else_and_shows_how_to_write_it(size):
    with pytest.raises(ConfigError, match=r'"6GiB"|use KiB'):
        parse_size(size, total_bytes=10_000, free_bytes=7_000)


@pytest.mark.parametrize(("text", "expected"), [("3.5GB/s", 3_500_000_000), ("800 MB", 800_000_000), ("1GiB/s", GIB)])
def test_rates_are_sizes_a_second(text, expected):
    assert parse_rate(text) == expected


@pytest.mark.parametrize("text", ["80%", "auto", "fast", "0", "1GB/min"])
def test_refuses_what_is_no_rate(text):
    with pytest.raises(ConfigError, match="is not a rate; write it as"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (512 * MIB, "512 MiB"),
        (1023 * MIB, "1.0 GiB"),
        (int(5.9 * GIB), "5.9 GiB"),
        (99 * GIB + 990 * MIB, "100 GiB"),
        (-3 * GIB, "-3.0 GiB"),
        (3000 * 1024 * GIB, "3000 TiB"),
    ],
)
def test_formats_in_few_digits(size_bytes, expected):
    assert format_size(size_bytes) == expected
