"""JSON that is odd: deep, long, out of range, half a surrogate pair, twice the same key; some of it is not JSON at all."""

from collections.abc import Mapping, Sequence

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

# --- what a caller can teach ------------------------------------------------------------------------

_WRONG_COUNTS = (
    *("-1", "1.5", '"7"', "true", "[7]", '{"a":7}', "NaN", "-Infinity"),
    *("9007199254740992", "9223372036854775808", "18446744073709551616", "1e300", "1e400"),
)
_WRONG_TEXTS = ("7", "true", "[]", "{}")
_WRONG_TIMES = (
    *("7", "true", "[]", "{}", '""', '"never"', '"0000-01-01T00:00:00Z"', '"2026-02-30T12:00:00Z"'),
    *('"10000-01-01T00:00:00Z"', '"2026-01-31T12:00:00+24:00"', '"2026-01-31T12:00:00+0A:00"'),
)
_WRONG_SPANS = ("7", "true", "[]", "{}", '""', '"-00:00:01"', '"1e9"')
_TOO_LONG = '"1000000.00:00:00"'
_TOO_DEEP = '{"x":' * 63 + "1" + "}" * 63

WRONG: Mapping[str, Mapping[str, Sequence[str]]] = {
    "HeartbeatRequest": {
        "FailoverScore": (
            "null",
            "-1",
            "100.5",
            '"7"',
            "true",
            "NaN",
            "1e300",
            "1e400",
            "[7]",
            "{}",
        ),
        "Epoch": _WRONG_COUNTS,
        "Holds": _WRONG_COUNTS,
        "FailsafeRevision": _WRONG_COUNTS,
        "Instance": (*_WRONG_TEXTS, f'"{"x" * 129}"'),
        "LastDataProcessedTime": _WRONG_TIMES,
        "Promised": ("7", '"true"', "[]", "{}"),
    },
    "ReleaseRequest": {
        "Epoch": ("null", *_WRONG_COUNTS),
        "Instance": (*_WRONG_TEXTS, f'"{"x" * 129}"'),
        "HoldOffPeriod": (*_WRONG_SPANS, _TOO_LONG, '"1.00:00:00.0000001"'),
        "LastDataProcessedTime": _WRONG_TIMES,
        "Reason": (*_WRONG_TEXTS, f'"{"x" * 257}"'),
        "Held": ("7", '"true"', "[]", "{}"),
    },
    "SessionRequest": {
        "Id": ("null", *_WRONG_TEXTS, '""', '"."', '"a/b"', f'"{"x" * 257}"'),
        "Name": (*_WRONG_TEXTS, f'"{"x" * 1025}"'),
        "Instance": (*_WRONG_TEXTS, f'"{"x" * 129}"'),
        "AdditionalData": ("7", "true", "[]", '"x"', _TOO_DEEP, '{"x":1e400}'),
    },
    "GroupRequest": {
        "Id": ("null", *_WRONG_TEXTS, '""', '".."', '"a/b"', f'"{"x" * 257}"'),
        "FailoverTimeout": ("null", *_WRONG_SPANS, _TOO_LONG, '"00:00:00"'),
        "AdditionalData": ("7", "true", "[]", '"x"', _TOO_DEEP, '{"x":1e400}'),
    },
    "RoleOverrideRequest": {
        "Value": ("null", "2", "-1", "1.5", '"7"', "true", "NaN", "1e300", "[1]", "{}"),
        "ExpirationPeriod": (*_WRONG_SPANS, '"00:00:00"', '"2000000.00:00:00"'),
    },
}
"""Values that a property of a request must not have."""

_ODD_TIMES = (
    *('"0001-01-01T00:00:00+14:00"', '"0001-01-01T00:00:00.0000001Z"', '"0001-01-02T00:00:00"'),
    *('"9999-12-31T23:59:59.9999999-23:59"', '"2026-01-31T12:00:00.123456789012+23:59"', "null"),
)
_ODD_TEXTS = ('""', '"\\u0000\\n\\u2028"', '"\\ud83d\\ude00"', f'"{"é" * 128}"', "null")

ODD: Mapping[str, Mapping[str, Sequence[str]]] = {
    "HeartbeatRequest": {
        "FailoverScore": ("0", "-0", "1E-400", "1.5", "100.0"),
        "Epoch": ("null", "0", "1.0"),
        "Holds": ("null", "9007199254740991"),
        "FailsafeRevision": ("null", "9007199254740991"),
        "Instance": _ODD_TEXTS,
        "LastDataProcessedTime": _ODD_TIMES,
        "Promised": ("true", "null"),
    },
    "ReleaseRequest": {
        "Epoch": ("0", "1.0", "9007199254740991"),
        "Instance": _ODD_TEXTS,
        "HoldOffPeriod": ('"1.00:00:00"', '"P1D"', "null"),
        "LastDataProcessedTime": _ODD_TIMES,
        "Reason": (*_ODD_TEXTS, f'"{"é" * 256}"'),
        "Held": ("false", "null"),
    },
    "SessionRequest": {
        "Name": (*_ODD_TEXTS, f'"{"é" * 1024}"'),
        "AdditionalData": (
            '{"x":' * 62 + "1" + "}" * 62,
            '{"":{"\\u0000":[null,-0,1E-400]}}',
            "null",
        ),
    },
    "GroupRequest": {
        "AdditionalData": (
            '{"x":' * 62 + "1" + "}" * 62,
            '{"":{"\\u0000":[null,-0,1E-400]}}',
            "null",
        ),
    },
    "RoleOverrideRequest": {
        "Value": ("0.0", '"oFF"'),
        "ExpirationPeriod": ('"1999999.23:59:59.9999999"', '"00:00:00.0000001"', "null"),
    },
}
"""Values that a property of a request may have, odd as they are."""


def with_value(valid: Mapping[str, str], name: str, text: str) -> str:
    """A body that is valid but for one property, whose value is this JSON."""
    return "{" + ",".join(f'"{key}":{value}' for key, value in {**valid, name: text}.items()) + "}"
