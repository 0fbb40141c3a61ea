"""Which edit of a graph lets a node compute in few bits, or without Q/DQ of its own, by engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unirt.explanation.graph import Graph
from unirt.inspection import QUANTIZE

ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu"}
    | {"Gelu", "Mish", "Softplus", "Swish"}
)
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
MATRIX = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True)
class Cure:
    """What to edit, in words, and `why` the engine needs it, where its layers do not show that.
    `at` is the node that it is about; what one edit cures is one finding.
    """

    at: str
    edit: str
    why: str = ""


@dataclass(frozen=True)
class Behind:
    """What follows a node: the `chain` of those that might be computed with it in one kernel, the
    `last` of all of them, the QuantizeLinear of its result, and who takes that in floats besides.
    """

    chain: tuple[str, ...]
    last: str
    quantizer: str | None
    others: tuple[str, ...]


class Cures:
    """The rules of an engine whose products compute an activation too, before they round."""

    absorbed = ACTIVATIONS

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def of(self, node: str) -> Cure:
        """For a node that computes in floats, or has Q/DQ in kernels of their own around it."""
        product = node if self.graph.contracts(node) else self._product_before(node)
        return self._of_product(product) if product is not None else self._of_other(node)

    def of_split(self, product: str) -> Cure | None:
        """For a product in few bits whose result another kernel rounds; None if that must be."""
        return None

    def moved(self, node: str) -> Cure | None:
        """For nodes that one kernel could compute with what is before them, but for a pair."""
        graph = self.graph
        if not self._joins(node):
            return None
        given = graph.data(node)
        before = graph.maker(given[0]) if given else None
        if before is not None and self._joins(before):
            return self.moved(before)
        dequantizer = graph.dequantizer(given[0]) if given else None
        source = graph.source(dequantizer) if dequantizer is not None else None
        if dequantizer is None or source is None or graph.ops[source] in ACTIVATIONS:
            return None
        others = [*graph.readers(dequantizer), *graph.given_out(dequantizer)]
        if others != [node] or graph.readers(graph.pair(dequantizer) or "") != [dequantizer]:
            return None
        behind = self.behind(node)
        chain = (node, *(one for one in behind.chain if self._joins(one)))
        pair = filter(None, (graph.pair(dequantizer), dequantizer))
        there = "it" if chain[-1] == node else graph.told(node)
        quantizer = behind.quantizer if behind.last == chain[-1] else None
        why, how = self._rounding(chain, quantizer)
        return Cure(
            node,
            f"put Q/DQ behind {graph.told(chain[-1])}{how}, not between {graph.told(source)} and "
            f"{there}: take out {listed(pair)}",
            why,
        )

    def of_slow(self, node: str) -> Cure:
        """For a node that is slower than in floats."""
        return self._keep(node)

    def behind(self, node: str) -> Behind:
        graph = self.graph
        chain, last = [], node
        while True:
            readers, given = graph.readers(last), graph.given_out(last)
            alone = len(readers) == 1 and not given
            if alone and (graph.ops[readers[0]] in ACTIVATIONS or graph.adds_bias(readers[0])):
                last = readers[0]
                chain.append(last)
                continue
            quantizer = next((one for one in readers if graph.ops[one] == QUANTIZE), None)
            others = [graph.told(one) for one in readers if one != quantizer]
            others += [f"the network's output {name!r}" for name in given]
            return Behind(tuple(chain), last, quantizer, tuple(others))

    # Products

    def _product_before(self, node: str) -> str | None:
        """The product of quantized operands that a node might be computed with in one kernel."""
        graph = self.graph
        while graph.ops[node] in ACTIVATIONS or graph.adds_bias(node):
            given = graph.data(node)
            before = graph.maker(given[0]) if given else None
            if before is None or graph.quantizes(before):
                return None
            if graph.contracts(before):
                return before if graph.is_quantized(before) else None
            node = before
        return None

    def _of_product(self, node: str) -> Cure:
        graph = self.graph
        given = graph.data(node)
        lacking = [one for one in given if not graph.dequantizer(one)]
        if given and len(lacking) == len(given):
            return self._of_float_product(node, lacking[0])
        if lacking:
            return self._other_input(node, lacking[0])
        weight = graph.weight(node)
        if weight is not None and not graph.dequantizer(weight):
            return self._other_weight(node, weight)
        causes = list(self._causes(node)) or list(self._bias(node))
        if not causes:
            return self._keep(node)
        whys, edits = zip(*causes, strict=True)
        return Cure(node, "; ".join(edits), "; ".join(filter(None, whys)))

    def _of_float_product(self, node: str, given: str) -> Cure:
        """Its activations are not quantized. It may be that they were, one node before."""
        graph = self.graph
        before = graph.maker(given)
        moved = self.moved(before) if before is not None else None
        if moved is not None:
            return moved
        weight = graph.weight(node)
        if weight is None or not graph.dequantizer(weight):
            return self._nothing(node)
        where = graph.told(before) if before is not None else repr(given)
        return Cure(node, f"quantize the input of {graph.told(node)} too: it comes from {where}")

    def _causes(self, node: str) -> Iterator[tuple[str, str]]:
        """Why the engine has no kernel for a product of quantized operands, each with its edit."""
        graph, behind = self.graph, self.behind(node)
        pairs = {one for given in graph.data(node) if (one := graph.dequantizer(given))}
        pairs |= {pair for one in pairs if (pair := graph.pair(one))}
        if behind.quantizer is not None:
            pairs |= {behind.quantizer, *graph.readers(behind.quantizer)}
        several = [one for one in graph.in_order(pairs) if graph.scales(one) > 1]
        if several:
            yield (
                "its activations have a scale per channel, and kernels take one per tensor",
                f"give {listed(several)} one scale for all channels",
            )
        if behind.quantizer is not None and behind.others:
            others = " and ".join(behind.others)
            partner = next(iter(graph.readers(behind.quantizer)), behind.quantizer)
            yield (
                f"what {graph.told(behind.last)} gives is wanted in floats too, by {others}",
                f"let {others} take what {partner} gives instead",
            )

    def _bias(self, node: str) -> Iterator[tuple[str, str]]:
        """The cause where all else is quantized."""
        graph = self.graph
        bias = graph.bias(node)
        if bias is not None and not graph.dequantizer(bias):
            yield (
                f"its bias {bias!r} is float32",
                f"quantize the bias {bias!r} too, to int32 with the scale of the activations times "
                "that of the weight, as the cpu recipe does",
            )

    # Other nodes

    def _of_other(self, node: str) -> Cure:
        graph = self.graph
        moved = self.moved(node)
        if moved is not None:
            return moved
        given = graph.data(node)
        lacking = [one for one in given if not graph.dequantizer(one)]
        if not given or len(lacking) == len(given):
            return self._nothing(node)
        if lacking:
            return self._other_input(node, lacking[0])
        weight = graph.weight(node)
        if weight is not None and not graph.dequantizer(weight):
            return self._other_weight(node, weight)
        return self._between(node)

    def _between(self, node: str) -> Cure:
        """For a node that reads nothing but quantized tensors."""
        return self._keep(node)

    def _joins(self, node: str) -> bool:
        return self.graph.ops[node] in self.absorbed or self.graph.adds_bias(node)

    def _rounding(self, chain: Iterable[str], quantizer: str | None) -> tuple[str, str]:
        """Why a QuantizeLinear does not suit what is before it, and how it would."""
        return "", ""

    # Words that several share

    def _keep(self, node: str) -> Cure:
        read, weights = self.graph.instead(node)
        parts = [f"{tensor!r} instead of {name}" for name, tensor in read.items()]
        parts += ["float weights"] * weights
        which = f": let it read {' and '.join(parts)}" if parts else ""
        return Cure(node, f"keep {self.graph.told(node)} in float{which}")

    def _nothing(self, node: str) -> Cure:
        graph = self.graph
        told, quantizer = graph.told(node), self.behind(node).quantizer
        if quantizer is None:
            what = f"{told} is not quantized, and what is before it is"
            return Cure(node, f"nothing at this place: {what}")
        partners = graph.readers(quantizer)
        behind = [one for name in partners for one in graph.readers(name)]
        following = listed(map(graph.told, dict.fromkeys(behind))) or "what follows"
        return Cure(
            node,
            f"nothing at this place: {told} is not quantized, and what follows is; quantize its "
            f"inputs too, or leave {following} in float",
        )

    def _other_input(self, node: str, tensor: str) -> Cure:
        before = self.graph.maker(tensor)
        where = f"it comes from {self.graph.told(before)}" if before else repr(tensor)
        return Cure(node, f"quantize the other input of {self.graph.told(node)} too: {where}")

    def _other_weight(self, node: str, weight: str) -> Cure:
        return Cure(node, f"quantize the weight {weight!r} of {self.graph.told(node)} too")


class OnnxRuntimeCures(Cures):
    """It looks for Q/DQ on all sides of a node and makes one integer kernel of them. A Relu or Clip
    behind a product is part of it only where rounding cuts off all that it would.
    """

    absorbed = frozenset({"Relu", "Clip"})
    unsigned = "use the cpu recipe: uint8 activations (here they are int8)"
    # With integer kernels of their own, where their result is quantized too.
    integer = frozenset(
        {"Add", "Mul", "Concat", "Where", "AveragePool", "GlobalAveragePool", "LeakyRelu"}
        | {"Sigmoid", "Softmax", "MaxPool", "Resize", "Split"}
    )

    def __init__(self, graph: Graph, *, on_cpu: bool) -> None:
        super().__init__(graph)
        self.on_cpu = on_cpu

    def of_slow(self, node: str) -> Cure:
        quick = self.graph.contracts(node) or self.graph.ops[node] == "MaxPool"
        if quick and self._is_signed(node):
            return Cure(node, self.unsigned)
        return super().of_slow(node)

    def _causes(self, node: str) -> Iterator[tuple[str, str]]:
        found = list(super()._causes(node))
        graph, behind = self.graph, self.behind(node)
        foreign = next((one for one in behind.chain if not self._joins(one)), None)
        if foreign is not None:
            found.append(
                (
                    "ONNX Runtime makes only Relu and Clip part of a product",
                    f"put Q/DQ between {graph.told(node)} and {graph.told(foreign)} too",
                )
            )
        elif behind.quantizer is None:
            found.append(("", self._rounded_too(node, behind.last)))
        elif behind.chain:
            why, how = self._rounding(behind.chain, behind.quantizer)
            if why:
                found.append((why, f"quantize behind {graph.told(behind.last)}{how}"))
        bare = self._without_zero_point(node)
        if bare:
            found.append(
                (
                    f"{listed(bare)} {'has' if len(bare) == 1 else 'have'} no zero point, which "
                    "ONNX Runtime's integer Gemm wants",
                    f"give {listed(bare)} a zero point, which is 0",
                )
            )
        if not found and self._is_signed(node):
            found.append(("", self.unsigned))
        return iter(found)

    def _between(self, node: str) -> Cure:
        graph = self.graph
        if self.behind(node).quantizer is None and graph.readers(node):
            if graph.ops[node] in self.integer:
                return Cure(node, self._rounded_too(node, node))
        elif graph.ops[node] in self.integer and self._is_signed(node):
            return Cure(node, self.unsigned)
        return super()._between(node)

    def _without_zero_point(self, node: str) -> list[str]:
        graph = self.graph
        if graph.ops[node] != "Gemm" and not any(map(graph.adds_bias, graph.readers(node))):
            return []
        given = [*graph.data(node), graph.weight(node)]
        pairs = [one for tensor in given if tensor and (one := graph.dequantizer(tensor))]
        return [one for one in pairs if not graph.has_zero(one)]

    def _rounded_too(self, node: str, last: str) -> str:
        graph = self.graph
        told = graph.told(node)
        pairs = [one for given in graph.data(node) if (one := graph.dequantizer(given))]
        return (
            f"quantize the output of {graph.told(last)}{' behind it' if last != node else ''} too, "
            f"since integer kernels give integers; or leave {told} in float: take out "
            f"{listed(pairs)} and what belongs to it"
        )

    def _is_signed(self, node: str) -> bool:
        graph = self.graph
        pairs = [one for given in graph.data(node) if (one := graph.dequantizer(given))]
        return self.on_cpu and any(map(graph.is_signed, pairs))

    def _rounding(self, chain: Iterable[str], quantizer: str | None) -> tuple[str, str]:
        graph = self.graph
        for node in chain:
            if graph.ops[node] not in self.absorbed:
                continue
            low, high = graph.limits(node)
            if quantizer is not None and self._cuts_off(quantizer, low, high):
                continue
            op = graph.ops[node]
            if (low, high) == (0, np.inf):
                how = " with zero point 0 (uint8), as the cpu recipe does"
            else:
                how = f" with a range within {low:g} to {high:g}, as the cpu recipe does"
            if quantizer is None:
                return "", how
            zero: Any = graph.zero(quantizer)
            moved = low == 0 and int(zero) != np.iinfo(zero.dtype).min
            wrong = f"zero point {zero}, not the lowest {zero.dtype}" if moved else "a wider range"
            told = f"{quantizer} behind {graph.told(node)} has {wrong}"
            why = f"{told}, so that the {op} cannot become part of it"
            return why, how
        return "", ""

    def _cuts_off(self, quantizer: str, low: float, high: float) -> bool:
        """Whether rounding leaves nothing that is outside these limits; true where not known."""
        zero: Any = self.graph.zero(quantizer)
        scale = self.graph.scale(quantizer)
        if scale is None and (low, high) == (0, np.inf):
            scale = 1.0  # then it does not matter
        if zero is None or scale is None or zero.dtype.kind not in "iu":
            return True
        ends = np.iinfo(zero.dtype)
        # As it rounds them itself.
        return bool(
            np.rint(low / scale) + int(zero) <= ends.min
            and np.rint(high / scale) + int(zero) >= ends.max
        )


class TensorRTCures(Cures):
    """Its generated kernels compute what stands between products. TensorRT for RTX rounds in the
    kernel of a product itself only behind a single scale, and a Relu at most.
    """

    absorbed = frozenset({"Relu"})

    def __init__(self, graph: Graph, *, for_rtx: bool) -> None:
        super().__init__(graph)
        self.for_rtx = for_rtx

    def of(self, node: str) -> Cure:
        convolution = self._convolution(node)
        if convolution is None or not self.for_rtx:
            return super().of(node)
        return Cure(
            convolution,
            "take out the Q/DQ around convolutions, as the tensorrt-rtx recipe does",
            "TensorRT for RTX has no int8 convolution",
        )

    def of_split(self, product: str) -> Cure | None:
        graph, behind = self.graph, self.behind(product)
        # Its convolutions in fp8 answer wrongly with a single scale.
        if behind.quantizer is None or graph.ops[product] not in MATRIX:
            return None
        activations = [one for one in behind.chain if not graph.adds_bias(one)]
        joining = self.absorbed if graph.is_byte(behind.quantizer) else frozenset()
        if any(graph.ops[one] not in joining for one in activations):
            return None
        weight = graph.weight(product)
        dequantizer = graph.dequantizer(weight) if weight is not None else None
        several = dequantizer is not None and graph.scales(dequantizer) > 1
        bias = graph.bias(product) is not None
        joined = "product, activation and rounding" if activations else "product and rounding"
        if several:
            one = "give the weight one scale, as the tensorrt-rtx recipe does"
            return Cure(
                product,
                f"{one}; {joined} become one kernel where there is no bias either"
                if bias
                else f"{one}: {joined} become one kernel",
                "the weight has a scale per channel" + (", and there is a bias" if bias else ""),
            )
        if bias:
            return Cure(product, f"nothing while there is a bias: without, {joined} are one kernel")
        return None

    def _convolution(self, node: str) -> str | None:
        """The int8 convolution that a node is, or whose result it works on."""
        graph = self.graph
        found: str | None = node
        if not graph.contracts(node):
            given = graph.data(node)
            pair = graph.dequantizer(given[0]) if len(given) == 1 else None
            found = graph.source(pair) if pair is not None else self._product_before(node)
        if found is None or graph.ops[found] not in CONVOLUTIONS:
            return None
        read = [*graph.data(found), graph.weight(found)]
        pairs = [one for tensor in read if tensor and (one := graph.dequantizer(tensor))]
        return found if any(map(graph.is_byte, pairs)) else None


def cures_for(
    backend: str, graph: Graph, device: str, facts: Mapping[str, object] | None = None
) -> Cures:
    """The rules of a backend, by its name and the facts of its engine."""
    if backend == "onnxruntime":
        return OnnxRuntimeCures(graph, on_cpu=device == "cpu")
    if backend == "tensorrt":
        return TensorRTCures(graph, for_rtx=(facts or {}).get("flavour") == "tensorrt_rtx")
    return Cures(graph)


FEW = 4


def listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - FEW
    text = ", ".join(listed[: FEW if more > 1 else None])
    return f"{text} and {more} more" if more > 1 else text
