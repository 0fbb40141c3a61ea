"""OpenVINO as a UniRT backend: CPU, GPU and NPU as its runtime reports them."""

import unirt


@unirt.hookimpl
def unirt_backend() -> unirt.Backend:
    from unirt_openvino._backend import OpenVINOBackend

    return OpenVINOBackend()
