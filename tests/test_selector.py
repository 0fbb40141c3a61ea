"""Ranking is pure: the same facts give the same order, and every candidate keeps its reasons."""

from __future__ import annotations

import pytest

from unirt import CPU, Candidate, CandidateError, Device
from unirt.selector import RULES, Facts, rank

GPU = Device("cuda", 0, "NVIDIA H200")
INTEL = Device("cpu", None, "Intel(R) Xeon(R) Platinum")


def order(*facts: Facts) -> list[str]:
    return [str(row.candidate) for row in rank("m", facts).rows]


def facts(text: str, device: Device = CPU, **more: object) -> Facts:
    return Facts(Candidate.parse(text), "1", device, "onnx", **more)  # type: ignore[arg-type]


def test_tensorrt_leads_on_an_nvidia_gpu_and_the_oracle_comes_last() -> None:
    found = order(
        facts("reference"),
        facts("onnxruntime@cpu"),
        facts("onnxruntime@cuda:0", GPU),
        facts("tensorrt@cuda:0", GPU),
    )
    assert found == ["tensorrt@cuda:0", "onnxruntime@cuda:0", "onnxruntime@cpu", "reference"]


def test_openvino_leads_on_the_processors_of_its_vendor_only() -> None:
    assert order(facts("onnxruntime"), facts("openvino"))[0] == "onnxruntime"
    assert order(facts("onnxruntime", INTEL), facts("openvino", INTEL))[0] == "openvino"


def test_the_models_own_format_counts() -> None:
    assert order(facts("onnxruntime", native=False), facts("tflite"))[0] == "tflite"
    assert order(facts("onnxruntime"), facts("tflite", native=False))[0] == "onnxruntime"


def test_what_is_out_comes_last_and_keeps_its_reason() -> None:
    selection = rank("m", [facts("tensorrt", GPU, excluded="no driver"), facts("reference")])
    assert selection.best == Candidate("reference")
    assert selection.excluded == {"tensorrt": "no driver"}
    assert "out: no driver" in str(selection)


def test_nothing_usable_is_no_best() -> None:
    assert rank("m", [facts("onnxruntime", excluded="broken")]).best is None
    assert rank("m", []).candidates == ()


def test_points_are_the_sum_of_the_rules_shown() -> None:
    for row in rank("m", [facts("openvino", INTEL), facts("tensorrt", GPU)]).rows:
        assert row.points == sum(int(reason.split()[0]) for reason in row.reasons)


def test_equal_points_go_by_name() -> None:
    assert order(facts("zeta"), facts("alpha")) == ["alpha", "zeta"]


def test_every_rule_gives_points_and_an_argument() -> None:
    for rule in RULES:
        assert rule.points
        assert len(rule.because) > 10


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("onnxruntime", ("onnxruntime", None, None)),
        ("openvino@cpu", ("openvino", "cpu", None)),
        ("openvino:int8", ("openvino", None, "int8")),
        ("tensorrt@cuda:0:fp8", ("tensorrt", "cuda:0", "fp8")),
        ("tensorrt@cuda:fp16", ("tensorrt", "cuda", "fp16")),
        ("my-engine@npu:12", ("my-engine", "npu:12", None)),
    ],
)
def test_a_candidate_is_written_as_it_is_read(text: str, parts: tuple[str | None, ...]) -> None:
    candidate = Candidate.parse(text)
    assert (candidate.backend, candidate.device, candidate.precision) == parts
    assert str(candidate) == text
    assert Candidate.parse(candidate) is candidate


@pytest.mark.parametrize(
    "text",
    ["", "@cpu", "onnxruntime@", "a@cpu:", "a:8bit", "A", "a b", "a@cuda:0:1", "a@b@c", None],
)
def test_what_is_no_candidate_is_refused(text: str) -> None:
    with pytest.raises(CandidateError):
        Candidate.parse(text)
