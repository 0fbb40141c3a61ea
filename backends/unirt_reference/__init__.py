"""ONNX's own NumPy evaluator as a UniRT backend: slow and trusted, the oracle for the others."""

import unirt


@unirt.hookimpl
def unirt_backend() -> unirt.Backend:
    from unirt_reference._backend import ReferenceBackend

    return ReferenceBackend()
