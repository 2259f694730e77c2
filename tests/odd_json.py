"""JSON that is odd: deep, long, out of range, half a surrogate pair, twice the same key; some of it is none."""

from hypothesis import strategies as st

_ODD_STRINGS = st.sampled_from(["\\u0000", "\\ud800", "\\udc00\\ud800", "\\ud83d\\ude00", "é", ""])
_ODD_VALUES = st.one_of(
    st.sampled_from(["null", "true", "-0", "1e400", "-1e400", "1E-400", "0.1", "NaN", "01"]),
    st.integers(1, 6000).map(lambda digits: "9" * digits),
    st.integers(1, 6000).map(lambda digits: f"-0.{'9' * digits}"),
    st.integers(1, 6000).map(lambda digits: f"1e{'0' * digits}1"),
    st.builds(lambda n: "[" * n + "]" * n, st.sampled_from([1, 61, 63, 198, 199, 200, 201, 9000])),
    st.builds(lambda n: '{"a":' * n + "1e400" + "}" * n, st.sampled_from([1, 62, 198, 205, 9000])),
    st.builds(lambda text: f'"{text}"', _ODD_STRINGS),
)


def _inner(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    names = st.sampled_from(["a", "Id", "\\u0000", "\\ud800"])
    members = st.lists(st.builds(lambda name, one: f'"{name}":{one}', names, values), max_size=3)
    lists = st.lists(values, max_size=3)
    return st.one_of(
        members.map(lambda inner: "{" + ",".join(inner) + "}"),
        lists.map(lambda inner: "[" + ",".join(inner) + "]"),
    )


ODD_JSON = st.recursive(_ODD_VALUES, _inner, max_leaves=6)
