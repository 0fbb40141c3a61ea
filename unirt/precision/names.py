"""Names that a caller gave: refused where nothing is called so, with the nearest that there is."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from unirt.errors import OptionError

if TYPE_CHECKING:
    import onnx


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a wrong name: take the one most like it, or `otherwise` if none is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def check_names(names: Iterable[str], known: Iterable[str], what: str = "tensor") -> None:
    """Raises OptionError for the first name that is not known, with the nearest one that is."""
    known = set(known)
    for name in names:
        if name not in known:
            raise OptionError(
                f"There is no {what} {name!r} in the network.",
                f"Its main graph has {len(known)} others.",
                nearest(str(name), known, "Look its names up in the ONNX graph."),
                name=name,
            )


def check_option(
    option: str,
    given: Collection[str],
    known: Collection[str],
    kind: str,
    lack: str,
    why: str,
    otherwise: str,
) -> None:
    """Raises OptionError unless the option is a collection of known names, of `kind`.

    `lack` says what an unknown one means, `why` what is known, and `otherwise` where to look.
    """
    names = isinstance(given, Collection) and all(isinstance(one, str) for one in given)
    if isinstance(given, str) or not names:
        raise OptionError(
            f"{option}={given!r} is no collection of names.",
            f"It names several {kind}.",
            f"Write {option}=[{given!r}]." if isinstance(given, str) else "Give a list of them.",
        )
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise OptionError(
            f"{option} names {unknown[0]!r}, and {lack}.",
            why,
            nearest(unknown[0], known, otherwise),
            option=option,
            unknown=unknown,
        )


def check_nodes(option: str, given: Collection[str], nodes: Iterable[onnx.NodeProto]) -> None:
    """Raises OptionError unless there are nodes of these names."""
    names = [node.name for node in nodes]
    check_option(
        option,
        given,
        names,
        "nodes",
        "the graph has no such node",
        f"Its main graph has {len(names):,} nodes.",
        "Look at the names of its nodes.",
    )
