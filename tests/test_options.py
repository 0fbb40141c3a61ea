"""Options: typed once, read from Python and from text, refused with the valid names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from unirt import OptionError, Options, option
from unirt.candidates import backends


@dataclass(frozen=True)
class Sample(Options):
    threads: int | None = option(None, "How many.", minimum=1)
    ratio: float = option(0.5, "How much.", minimum=0)
    spin: bool = option(False, "Whether.")
    mode: Literal["fast", "exact"] = option("fast", "Which.")
    folder: Path | None = option(None, "Where.")
    names: tuple[str, ...] = option((), "Whose.")
    extra: Mapping[str, str] = option({}, "What else.")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threads", "4", 4),
        ("threads", 4, 4),
        ("threads", "none", None),
        ("threads", None, None),
        ("ratio", "0.25", 0.25),
        ("ratio", 1, 1.0),
        ("spin", "yes", True),
        ("spin", "off", False),
        ("spin", True, True),
        ("mode", "exact", "exact"),
        ("folder", "some/place", Path("some/place")),
        ("names", "a,b", ("a", "b")),
        ("names", ["a", "b"], ("a", "b")),
        ("extra", "a=1,b=x=y", {"a": "1", "b": "x=y"}),
        ("extra", {"a": 1}, {"a": "1"}),
    ],
)
def test_takes_python_values_and_text(name: str, text: object, value: object) -> None:
    assert getattr(Sample.parse({name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", "four"),
        ("threads", 0),
        ("threads", "-1"),
        ("threads", 2.5),
        ("threads", True),
        ("ratio", "nan"),
        ("ratio", "much"),
        ("ratio", -1),
        ("spin", "maybe"),
        ("spin", 2),
        ("mode", "slow"),
        ("folder", 7),
        ("names", 7),
        ("extra", 7),
    ],
)
def test_refuses_what_does_not_fit_and_says_what_would(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name) as caught:
        Sample.parse({name: value}, owner="sample")
    assert caught.value.facts["option"] == name
    assert "sample" in str(caught.value)


def test_an_unknown_name_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'threads'") as caught:
        Sample.parse({"thread": 1})
    assert caught.value.facts["valid"] == sorted(Sample.__dataclass_fields__)


def test_an_instance_passes_through_and_another_class_does_not() -> None:
    mine = Sample(threads=2)
    assert Sample.parse(mine) == mine
    with pytest.raises(OptionError, match="threads"):
        Sample.parse(Sample(threads=-1))
    assert mine.changed() == {"threads": 2}
    with pytest.raises(OptionError):
        Sample.parse(Options())


@pytest.mark.parametrize("plugin", backends(), ids=lambda plugin: plugin.name)
def test_every_option_of_every_backend_says_what_it_means(plugin: Any) -> None:
    for info in plugin.backend.options.describe():
        assert len(info.help) > 10
        assert info.help.endswith((".", ")"))
        plugin.backend.options.parse({info.name: info.default})
