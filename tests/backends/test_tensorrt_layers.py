"""TensorRT's accounts of an engine's layers.

The texts in tests/data/layers are what the builder of TensorRT-RTX logged on a machine without a
GPU, unchanged; the JSON here is constructed after the same schemas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from unirt_tensorrt import _layers

from unirt import BackendError, EngineReport, Layer, LayerTensor

DATA = Path(__file__).parent.parent / "data" / "layers"
ATTENTION = "/block.0/attn[self, masked]/"

CNN = {
    "conv1": "Conv",
    "bn1": "BatchNormalization",
    "relu1": "Relu",
    "conv2": "Conv",
    "bn2": "BatchNormalization",
    "relu2": "Relu",
    "conv3": "Conv",
    "bn3": "BatchNormalization",
    "add": "Add",
    "relu3": "Relu",
    "pool": "GlobalAveragePool",
    "flatten": "Flatten",
    "fc": "MatMul",
}
QUANTIZED = {
    "x_quantize": "QuantizeLinear",
    "x_dequantize": "DequantizeLinear",
    "w1_dequantize": "DequantizeLinear",
    "fc1": "MatMul",
    "relu": "Relu",
    "hidden_quantize": "QuantizeLinear",
    "hidden_dequantize": "DequantizeLinear",
    "w2_dequantize": "DequantizeLinear",
    "fc2": "MatMul",
    "lonely_quantize": "QuantizeLinear",
    "lonely_dequantize": "DequantizeLinear",
    "softmax": "Softmax",
}


def logged(name: str, graph: Mapping[str, str] | None = None) -> EngineReport:
    report = _layers.from_builder_log(["noise", (DATA / name).read_text(), "more"], graph or {})
    assert report is not None
    return report


def nodes(report: EngineReport) -> list[tuple[str, ...]]:
    return [layer.nodes for layer in report.layers]


# --- the builder's log ---------------------------------------------------------------------------


def test_each_kernel_names_the_nodes_fused_into_it() -> None:
    assert nodes(logged("cnn.rtx-1.6.1.txt", CNN)) == [
        (),
        ("conv1", "bn1", "relu1"),
        ("conv2", "bn2", "relu2"),
        ("conv3",),
        ("bn3", "add", "relu3", "pool"),
        ("fc",),
    ]


def test_a_kernel_is_read_whole() -> None:
    layer = logged("cnn.rtx-1.6.1.txt", CNN).layers[4]
    assert layer == Layer(
        "__myl_MulAddAddReluMean_myl0_4",
        "kgen",
        ("bn3", "add", "relu3", "pool"),
        (
            LayerTensor("__myln_k_arg__bb1_3_myl0", "float32", (1, 16, 32, 32), "NHWC"),
            LayerTensor("__myln_k_arg__bb1_5_myl0", "float32", (1, 16, 32, 32), "NHWC"),
        ),
        (LayerTensor("__myln_k_arg__bb1_6_myl0", "float32", (1, 16, 1, 1), "Linear"),),
        "__myl_MulAddAddReluMean_0x67ad4e4f9f5805cda1a9a6cca4a51c29",
        None,
        (
            LayerTensor("__mye693_dconst_myl0", "float32", (1, 16, 1, 1), "NHWC"),
            LayerTensor("__mye698_dconst_myl0", "float32", (1, 16, 1, 1), "NHWC"),
        ),
        ("mul", "add", "add", "relu", "mean"),
    )


def test_the_network_s_own_tensors_are_told_apart() -> None:
    report = logged("cnn.rtx-1.6.1.txt", CNN)
    assert [(one.name, one.dtype, one.shape) for one in report.inputs] == [
        ("x", "float32", (1, 3, 32, 32))
    ]
    assert [one.name for one in report.outputs] == ["y"]


def test_a_reformat_that_the_builder_inserted_is_found_with_its_place() -> None:
    (found,) = logged("cnn.rtx-1.6.1.txt", CNN).reformats
    assert found.inserted
    assert found.where == "between x and conv1"
    assert found.change == "float32 Linear → float32 NHWC"


def test_a_node_without_any_work_is_in_no_layer() -> None:
    assert logged("cnn.rtx-1.6.1.txt", CNN).missing == ("flatten",)


def test_a_stand_in_for_a_library_s_kernel_is_no_tactic() -> None:
    assert logged("cnn.rtx-1.6.1.txt").layers[3].tactic == ""


def test_the_old_schema_is_read_too() -> None:
    graph = {"cast_in": "Cast", **CNN, "cast_out": "Cast"}
    report = logged("cnn_fp16.rtx-1.4.0.txt", graph)
    assert nodes(report)[:2] == [("cast_in", "conv1"), ("conv1", "bn1", "relu1")]
    assert report.layers[0].inputs == (LayerTensor("x", "float32", (1, 3, 32, 32)),)
    assert report.layers[0].outputs[0].dtype == "float16"
    assert report.layers[0].operations == ("cast", "pad")
    assert report.precisions == {"float16": 5}
    # It lists the network's tensors without a direction; the layers tell.
    assert [one.where for one in report.reformats] == ["between x and conv1", "between fc and y"]
    assert not any(one.inserted for one in report.reformats)


def test_an_attention_block_is_seen_as_one_kernel() -> None:
    report = logged("transformer_fp16.rtx-1.6.1.txt")
    fused = next(layer for layer in report.layers if layer.operations == ("attention",))
    assert set(fused.nodes) == {
        ATTENTION + one for one in ("scores", "scale", "Softmax", "context")
    }
    merged = report.layers[1]
    assert merged.nodes == tuple(f"{ATTENTION}{one}_proj/MatMul" for one in "vkq")
    assert merged.name.startswith(ATTENTION)
    assert report.precisions == {"float16": 7}


def test_quantization_on_its_own_and_for_nothing_is_found() -> None:
    report = logged("qdq.rtx-1.6.1.txt", QUANTIZED)
    assert [one.layer.nodes for one in report.unfused_quantization] == [("x_quantize",)]
    assert report.idle_quantization == ("lonely_quantize", "lonely_dequantize")
    assert report.precisions == {"int8": 2, "float32": 2}
    assert report.missing == ()


def test_names_with_brackets_commas_and_keys_in_them_stay_whole() -> None:
    report = logged("odd_names.rtx-1.6.1.txt")
    assert nodes(report) == [
        ("node_of_a", "same"),
        ("s, LayerType: x] [b",),
        ("same", '{a} "q"'),
    ]


def test_layers_and_tensors_may_have_such_names_too() -> None:
    odd = "a, Part: one], {b [c}"
    text = (DATA / "odd_names.rtx-1.6.1.txt").read_text()
    for known in ("node_of_a_myl0_0", "__myln_k_arg__bb1_2_myl0"):
        assert known in text
        text = text.replace(known, odd)
    report = _layers.from_builder_log([text], {})
    assert report is not None
    first, second, third = report.layers
    assert first.name == first.outputs[0].name == second.inputs[1].name == odd
    assert first.kind == "gemm"
    assert len(first.constants) == 3
    assert third.outputs[0].name == "y"


def test_nodes_in_functions_stand_behind_the_call() -> None:
    report = logged("functions.rtx-1.6.1.txt", {"block1": "Block", "block2": "Block"})
    assert nodes(report) == [
        ("block1 > inner_mm", "block1 > inner_relu"),
        ("block2 > inner_mm", "block2 > inner_relu"),
    ]
    assert report.missing == ()


def test_each_profile_has_its_layers() -> None:
    report = logged("two_profiles.rtx-1.6.1.txt", {"conv": "Conv", "relu": "Relu"})
    assert [layer.profile for layer in report.layers] == [0, 0, 0, 1, 1, 1, 1]
    for profile in report.profiles:
        found = report.of_profile(profile).reformats
        assert [one.where for one in found] == ["between x and conv", "between relu and y"]
    assert report.of_profile(1).layers[1].inputs[0].shape == (-1, 8, 16, 16)


def test_names_only_give_regions_and_say_so() -> None:
    messages = json.loads((DATA / "names_only.rtx-1.6.1.json").read_text())
    report = _layers.from_builder_log(messages, {"conv": "Conv", "relu": "Relu"})
    assert report is not None
    assert [layer.kind for layer in report.layers] == ["region", "region"]
    assert nodes(report) == [("conv", "relu")] * 2
    assert [layer.profile for layer in report.layers] == [0, 1]
    assert [one.name for one in report.layers[1].inputs] == ["x"]
    assert report.fused == ()
    assert "verbosity=detailed" in report.notes[0]


def test_the_last_engine_of_a_log_counts() -> None:
    texts = [(DATA / name).read_text() for name in ("qdq.rtx-1.6.1.txt", "cnn.rtx-1.6.1.txt")]
    report = _layers.from_builder_log(texts, {})
    assert report is not None
    assert len(report.layers) == 6


def test_a_log_without_layers_has_no_report() -> None:
    noise = "[checkMacros.cpp::catchCudaError::229] Error Code 1: Cuda Runtime (cudaError 35)"
    assert _layers.from_builder_log([noise, "Engine Layer Information:\n"], {}) is None
    assert _layers.from_builder_log([], {}) is None


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.txt")))
def test_a_text_cut_off_anywhere_is_read_as_far_as_it_goes(name: str) -> None:
    text = (DATA / name).read_text()
    whole = [layer.name for layer in logged(name).layers]
    for end in range(len("Layers:"), len(text), 61):
        report = _layers.from_builder_log([text[:end]], {})
        assert report is not None
        found = [layer.name for layer in report.layers]
        assert found[:-1] == whole[: max(0, len(found) - 1)]


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.txt")))
def test_a_report_of_a_real_log_can_be_kept(name: str) -> None:
    report = logged(name, CNN)
    assert EngineReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


# --- the inspector's JSON (constructed) ----------------------------------------------------------


def new_tensor(name: str, dtype: str, layout: str = "(Linear) Row major linear format") -> Any:
    return {
        "Name": name,
        "Dimensions": [1, 16, 32, 32],
        "Strides": [16384, 1, 512, 16],
        "StrideOrder": [3, 0, 2, 1],
        "Datatype": dtype,
        "Format": layout,
    }


NEW: dict[str, Any] = {
    "Layers": [
        {
            "Name": "__myl_Move_myl0_0",
            "LayerType": "kgen",
            "Inputs": [new_tensor("x", "Float")],
            "Constants": [],
            "Outputs": [new_tensor("t", "Float", "(NHWC) Channel major format")],
            "TacticName": "__myl_Move_0x1",
            "StreamId": 0,
            "Metadata": "",
        },
        {
            "Name": "__myl_CorrMulAddRelu_myl0_1",
            "LayerType": "runtime_fusion",
            "Inputs": [new_tensor("t", "Float", "(NHWC) Channel major format")],
            "Constants": [new_tensor("w", "Float", "(NHWC) Channel major format")],
            "Outputs": [new_tensor("y", "Float", "(NHWC) Channel major format")],
            "TacticName": "",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: bn1]\x1f[ONNX Layer: conv[1]]\x1f[ONNX Layer: relu1]",
        },
    ],
    "I/O Tensors": [
        {"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 16, 32, 32]},
        {"Name": "y", "IOMode": "Output", "DataType": "Float", "Dimensions": [1, 16, 32, 32]},
    ],
}


def old_tensor(name: str, text: str) -> Any:
    return {
        "Name": name,
        "Location": "Device",
        "Dimensions": [1, 64, 56, 56],
        "Format/Datatype": text,
    }


OLD: dict[str, Any] = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
            "LayerType": "Reformat",
            "Inputs": [old_tensor("x", "Row major linear FP32")],
            "Outputs": [
                old_tensor(
                    "Reformatted Input Tensor 0 to conv1 + relu1",
                    "Channel major FP16 format where channel % 8 == 0",
                )
            ],
            "ParameterType": "Reformat",
            "Origin": "REFORMAT",
            "TacticValue": "0x00000000000003ea",
            "StreamId": 0,
            "Metadata": "",
        },
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [
                old_tensor(
                    "Reformatted Input Tensor 0 to conv1 + relu1",
                    "Channel major FP16 format where channel % 8 == 0",
                )
            ],
            "Outputs": [
                old_tensor("y", "Thirty-two wide channel vectorized row major Int8 format.")
            ],
            "ParameterType": "Convolution",
            "Weights": {"Type": "Half", "Count": 4096},
            "TacticName": "sm80_xmma_fprop_implicit_gemm",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
        },
    ],
    "Bindings": ["x", "y"],
}
GRAPH = {"conv1": "Conv", "conv[1]": "Conv", "bn1": "BatchNormalization", "relu1": "Relu"}


def test_json_of_the_new_schema_is_read() -> None:
    report = _layers.from_inspector(json.dumps(NEW), GRAPH)
    assert report.source == "engine inspector"
    assert nodes(report) == [(), ("conv[1]", "bn1", "relu1")]
    assert report.layers[1].constants[0].name == "w"
    assert [one.where for one in report.reformats] == ["between x and conv[1]"]
    assert report.inputs[0].name == "x"
    assert report.outputs[0].name == "y"


def test_json_of_the_old_schema_is_read() -> None:
    report = _layers.from_inspector(json.dumps(OLD), GRAPH)
    move, conv = report.layers
    assert conv.nodes == ("conv1", "relu1")
    assert conv.tactic == "sm80_xmma_fprop_implicit_gemm"
    assert str(conv.inputs[0]) == "float16 Channel major where channel % 8 == 0"
    assert str(conv.outputs[0]) == "int8 Thirty-two wide channel vectorized row major"
    assert move.tactic == "0x00000000000003ea"
    (found,) = report.reformats
    assert found.inserted
    assert found.where == "between x and conv1"
    assert found.change.startswith("float32 Row major linear → float16")


@pytest.mark.parametrize(
    "document",
    [NEW, NEW["Layers"], [NEW], {"Engine": NEW}],
    ids=["object", "list", "list of one object", "object inside"],
)
def test_json_may_have_several_shapes(document: Any) -> None:
    assert len(_layers.from_inspector(json.dumps(document), GRAPH).layers) == 2


def test_one_layer_alone_is_a_report_too() -> None:
    (only,) = _layers.from_inspector(json.dumps(NEW["Layers"][1]), GRAPH).layers
    assert only.operations == ("convolution", "mul", "add", "relu")


def test_control_characters_stand_in_json_as_they_are() -> None:
    text = json.dumps(NEW).replace("\\u001f", "\x1f")
    assert "\x1f" in text
    assert nodes(_layers.from_inspector(text.encode(), GRAPH))[1] == ("conv[1]", "bn1", "relu1")


def test_layers_that_are_only_names_give_the_nodes_that_can_be_known() -> None:
    names = ["conv1 + relu1", "PWN(PWN(relu1), bn1)", "{ForeignNode[conv1...fc]} [profile 1]"]
    report = _layers.from_inspector(json.dumps({"Layers": names}), GRAPH)
    assert nodes(report) == [("conv1", "relu1"), ("bn1", "relu1"), ()]
    assert report.layers[2].kind == "region"
    assert report.layers[2].profile == 1
    assert report.notes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Half", "float16"),
        ("BFloat16", "bfloat16"),
        ("FP8", "float8_e4m3fn"),
        ("Int4", "int4"),
        ("UInt8", "uint8"),
        ("Int64", "int64"),
        ("Bool", "bool"),
        ("Quaternion", "Quaternion"),
    ],
)
def test_types_have_unirt_s_names_and_unknown_ones_keep_their_own(text: str, expected: str) -> None:
    new: Any = {"Layers": [{"Name": "a", "Inputs": [new_tensor("x", text)]}]}
    old: Any = {"Layers": [{"Name": "a", "Inputs": [old_tensor("x", text)]}]}
    for document in (new, old):
        (layer,) = _layers.from_inspector(json.dumps(document), {}).layers
        assert layer.inputs[0].dtype == expected


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", '{"Layers": 3}', '[{"Layers": 1}, 2]', "[" * 100_000]
)
def test_json_that_cannot_be_read_is_one_error(text: str) -> None:
    with pytest.raises(BackendError, match="cannot be read"):
        _layers.from_inspector(text, {})


def test_fields_of_another_type_do_no_harm() -> None:
    odd = {"Name": 3, "LayerType": None, "Inputs": "x", "Outputs": [1], "Metadata": None}
    (layer,) = _layers.from_inspector(json.dumps([odd]), {}).layers
    assert layer.name == "3"
    assert layer.outputs[0].name == "1"


def test_profiled_times_join_the_inspector_s_layers() -> None:
    report = _layers.from_inspector(json.dumps(NEW), GRAPH)
    timed = report.with_times([("__myl_Move_myl0_0", 1e-6), ("__myl_CorrMulAddRelu_myl0_1", 3e-6)])
    assert timed.unmatched == ()
    assert timed.seconds == pytest.approx(4e-6)


# --- the builder that is installed ---------------------------------------------------------------


def test_the_installed_builder_tells_its_layers() -> None:
    onnx = pytest.importorskip("onnx")
    trt = pytest.importorskip("tensorrt_rtx")
    network = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 19]> net (float[4,64] x) => (float[4,64] y)
        <float[64,64] w> { [mm] a = MatMul(x, w) [relu] y = Relu(a) }"""
    )
    weights = onnx.numpy_helper.from_array(_ramp(64, 64), "w")
    del network.graph.initializer[:]
    network.graph.initializer.append(weights)
    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.append(text)

    log = Log()
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    assert trt.OnnxParser(definition, log).parse(network.SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(definition, config) is not None
    report = _layers.from_builder_log(messages, {"mm": "MatMul", "relu": "Relu"})
    assert report is not None
    assert report.missing == ()
    assert set(report.precisions) == {"float32"}
    assert {one.name for one in report.inputs} >= {"x"}


def _ramp(*shape: int) -> Any:
    import numpy as np

    return np.linspace(-1, 1, num=int(np.prod(shape)), dtype=np.float32).reshape(shape)
