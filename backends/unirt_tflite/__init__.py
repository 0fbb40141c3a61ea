"""TFLite as a UniRT backend: the interpreter of ai-edge-litert, or of tflite-runtime."""

import unirt


@unirt.hookimpl
def unirt_backend() -> unirt.Backend:
    from unirt_tflite._backend import TFLiteBackend

    return TFLiteBackend()
