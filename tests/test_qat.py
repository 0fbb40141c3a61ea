"""The network trained with fake quantization: its accuracy on each engine, its scales untouched."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import unirt
from unirt.precision import calibrate, quantize

FOLDER = Path(__file__).parent.parent / "examples" / "qat"
FP32, QAT = FOLDER / "fp32.onnx", FOLDER / "qat.onnx"
README = (FOLDER / "README.md").read_text()
PUBLISHED = json.loads((FOLDER / "accuracy.json").read_text())
"""The figures of the README, as `measure.py` saved them."""
FLOAT, INT8 = 0.9578, 0.9496
"""Shares of the 1,350 photographs that the two networks read."""
UNFUSED = {"optimization": "disable"}
"""ONNX Runtime computes Q/DQ as it is written: full-range int8 weights overflow where a CPU without
VNNI fuses it (see the README)."""


@pytest.fixture(scope="module")
def test_set() -> Mapping[str, Any]:
    return dict(np.load(FOLDER / "test.npz"))


@pytest.fixture(scope="module")
def ptq() -> unirt.Model:
    """The float32 network, calibrated to the largest values and quantized as TensorRT wants it."""
    calibration = calibrate(FP32, FOLDER / "calibration.npz", method="max")
    return quantize(FP32, calibration, "int8", "tensorrt").model


def logits(model: Any, engine: str, images: Any, options: Any = None) -> Any:
    with unirt.load(model, engine, options=options) as session:
        parts = np.array_split(images, max(1, len(images) // 135))
        return np.concatenate([session.run({"image": part})["logits"] for part in parts])


def accuracy(model: Any, engine: str, data: Mapping[str, Any], options: Any = None) -> float:
    answers = logits(model, engine, data["image"], options)
    return float((answers.argmax(1) == data["labels"]).mean())


def scales(model: onnx.ModelProto) -> dict[str, Any]:
    """Of all Q/DQ nodes, by the name of the tensor that holds them."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {node.input[1]: stored[node.input[1]] for node in nodes}


def learned() -> dict[str, Any]:
    content = json.loads((FOLDER / "scales.json").read_text())
    return {name: np.array(value, np.float32) for name, value in content.items()}


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == np.float32 and np.array_equal(found[name], wanted[name])
        for name in wanted
    )


def test_training_wins_back_what_quantization_after_it_lost(
    test_set: Mapping[str, Any], ptq: unirt.Model
) -> None:
    pytest.importorskip("onnxruntime")
    before, lost, won = (
        accuracy(model, "onnxruntime", test_set, UNFUSED) for model in (FP32, ptq, QAT)
    )
    assert before - lost > 0.1, "max-calibrated PTQ should lose visibly"
    assert (won - lost) / (before - lost) >= 0.9


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_reads_the_photographs_in_int8(engine: str, test_set: Mapping[str, Any]) -> None:
    """Fused, and so with the CPU's integer kernels, which its weights of 7 bits do not overflow."""
    pytest.importorskip(engine)
    shares = accuracy(FP32, engine, test_set), accuracy(QAT, engine, test_set)
    assert shares[0] == pytest.approx(FLOAT, abs=0.002)
    assert shares[1] == pytest.approx(INT8, abs=0.006)
    assert shares[0] - shares[1] < 0.03


def test_the_reference_agrees_with_the_graph_as_onnxruntime_computes_it(
    test_set: Mapping[str, Any],
) -> None:
    pytest.importorskip("onnxruntime")
    images, labels = test_set["image"][:270], test_set["labels"][:270]
    exact = logits(QAT, "reference", images)
    assert (exact.argmax(1) == labels).mean() > INT8 - 0.04
    near = logits(QAT, "onnxruntime", images, UNFUSED)
    assert (exact.argmax(1) == near.argmax(1)).mean() > 0.98


@pytest.fixture(scope="module")
def measure() -> Any:
    """examples/qat/measure.py as a module."""
    spec = importlib.util.spec_from_file_location("qat_measure", FOLDER / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def networks(measure: Any) -> Mapping[str, unirt.Model]:
    found: Mapping[str, unirt.Model] = measure.networks()
    return found


def test_the_readme_shows_the_figures_that_were_measured(measure: Any) -> None:
    assert measure.table(PUBLISHED) in README
    assert measure.layer_table(PUBLISHED) in README
    assert f"wins back {100 * measure.won_back(PUBLISHED):.1f} % of" in README
    versions = PUBLISHED["versions"]
    assert (
        f"onnx {versions['onnx']}, onnxruntime {versions['onnxruntime']} and "
        f"openvino {versions['openvino']}"
    ) in README
    assert "avx2" in PUBLISHED["instruction_sets"]
    assert not integer_sets(PUBLISHED["instruction_sets"])


@pytest.mark.parametrize("engine", ["onnxruntime, unfused", "onnxruntime", "openvino"])
def test_the_figures_are_those_of_the_engine_here(
    engine: str, measure: Any, networks: Mapping[str, unirt.Model]
) -> None:
    """Recomputed, on the CPUs that they are for; half a point is room for another machine."""
    pytest.importorskip(engine.partition(",")[0])
    fused = engine != "onnxruntime, unfused"
    if fused and (reason := other_kernels()):
        pytest.skip(reason)
    for network, shares in measure.on_engines(networks, [engine]).items():
        assert shares[engine] == pytest.approx(PUBLISHED["accuracy"][network][engine], abs=0.005)


def test_the_figures_of_single_layers_are_those_measured_here(measure: Any) -> None:
    pytest.importorskip("onnxruntime")
    some = [*measure.SENSITIVE, "/blocks/blocks.0/project/Conv", "/blocks/blocks.2/depthwise/Conv"]
    found = measure.by_layer(some)
    assert list(found) == [*(name for name in PUBLISHED["layers"] if name in some), measure.REST]
    for name, share in found.items():
        assert share == pytest.approx(PUBLISHED["layers"][name], abs=0.005)


def other_kernels() -> str:
    """Why engines that fuse Q/DQ answer otherwise on this CPU than in the README, if they do."""
    here = unirt.devices()[0].facts["instruction_sets"]
    if found := integer_sets(here):
        return f"this CPU has {', '.join(found)}, and the figures are for one without"
    return "" if "avx2" in here else "this CPU has no AVX2, and the figures are for one with it"


def integer_sets(features: Any) -> list[str]:
    """Instructions that sum int8 products in 32 bits, so that nothing overflows."""
    return sorted(name for name in features if "vnni" in name or "int8" in name)


def test_what_the_readme_says_of_torch_ao_is_what_was_run() -> None:
    """`toolkits.py` needs PyTorch, so it is not run here."""
    script = (FOLDER / "toolkits.py").read_text()
    compile(script, "toolkits.py", "exec")
    (block,) = (part for part in README.split("```python\n")[1:])
    lines = block.partition("```")[0].splitlines()
    written = {line.strip() for line in script.splitlines()}
    assert [line for line in lines if line.strip() and line.strip() not in written] == []


def test_the_graph_has_the_learned_scales() -> None:
    found = scales(onnx.load(QAT))
    assert len(found) == 64
    assert same(found, learned())


def test_every_convolution_reads_int8_by_tensorrts_rules() -> None:
    graph = onnx.load(QAT).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 32
    for node in products:
        activation, weight = makers[node.input[0]], makers[node.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        levels = stored[weight.input[0]]
        assert levels.dtype == np.int8
        assert np.abs(levels.astype(int)).max() <= 64
        assert stored[weight.input[1]].shape == (len(levels),)
        assert [a.i for a in weight.attribute if a.name == "axis"] == [0]
        assert node.input[2] in stored, "biases stay float32"
        assert stored[node.input[2]].dtype == np.float32
        assert not stored[weight.input[2]].any()
        assert stored[activation.input[1]].shape == ()
        assert stored[activation.input[2]].dtype == np.int8
        assert stored[activation.input[2]] == 0
    for node in (node for node in graph.node if node.op_type == "Add"):
        quantized = [makers[name].op_type == "DequantizeLinear" for name in node.input]
        assert sorted(quantized) == [False, True], "only the skip branch is quantized"


def test_tensorrt_rtx_computes_on_the_rounded_values_where_it_has_no_int8_convolutions() -> None:
    """The builder of RTX 1.6 has no kernels for those; answers on a GPU are not held here."""
    pytest.importorskip("tensorrt_rtx")
    from unirt_tensorrt._library import load

    if not load().is_rtx:
        pytest.skip("another TensorRT is in use, whose builder needs a GPU")
    with unirt.build(QAT, "tensorrt@aot") as engine:
        assert "for which this release has no kernels" in engine.facts["warnings"][0]
    unirt.build(FP32, "tensorrt@aot").close()


def test_neither_opening_nor_tensorrts_repair_touches_the_scales() -> None:
    from unirt_tensorrt._graph import prepare

    model = unirt.Model(QAT)
    assert same(scales(onnx.load_from_string(model.primary.read())), learned())
    prepared = prepare(onnx.load(QAT))
    assert prepared.repairs == ()
    assert prepared.warnings == ()
    assert same(scales(prepared.model), learned())
