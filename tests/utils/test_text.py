"""Text tables."""

from fastkd.utils.text import format_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["name", "a", "long heading"], ["longer name", "1.25", "2"], ["x"], ["y", "", "3"]]
    assert format_table(rows) == [
        "name            a  long heading",
        "longer name  1.25             2",
        "x",
        "y                             3",
    ]
    assert format_table([["a", "b", "c"], ["aa", "bb", "cc"]], left=2, gap=1) == ["a  b   c", "aa bb cc"]
