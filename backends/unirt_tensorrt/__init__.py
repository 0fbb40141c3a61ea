"""TensorRT as a UniRT backend: `tensorrt` 10 and 11, and TensorRT for RTX."""

from unirt import Backend, hookimpl


@hookimpl
def unirt_backend() -> Backend:
    from unirt_tensorrt._backend import TensorRTBackend

    return TensorRTBackend()
