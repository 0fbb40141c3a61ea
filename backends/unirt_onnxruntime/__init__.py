"""ONNX Runtime as a UniRT backend: CPU, CUDA, and other execution providers by the same code."""

import unirt


@unirt.hookimpl
def unirt_backend() -> unirt.Backend:
    from unirt_onnxruntime._backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend()
