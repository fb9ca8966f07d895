"""Text tables."""

from fastkd.utils.text import format_table, shortened


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["name", "a", "long heading"], ["longer name", "1.25", "2"], ["x"], ["y", "", "3"]]
    assert format_table(rows) == [
        "name            a  long heading",
        "longer name  1.25             2",
        "x",
        "y                             3",
    ]
    assert format_table([["a", "b", "c"], ["aa", "bb", "cc"]], left=2, gap=1) == ["a  b   c", "aa bb cc"]


def test_long_values_are_shortened() -> None:
    path = "/".join(["folder"] * 70)
    assert shortened(f"cache: got {path}; expected less.") == f"cache: got {path}; expected less."
    found = shortened(f"cache: got {'a' * 1_000_000}; expected less. Do that.")
    assert found.startswith("cache: got aaa")
    assert "… (999,741 characters) …" in found
    assert found.endswith("expected less. Do that.")
    assert len(found) < 400
    many = shortened(f"got {list(range(10_000))}; expected less. Do that.")
    assert len(many) < 4000
    assert many.endswith("expected less. Do that.")
