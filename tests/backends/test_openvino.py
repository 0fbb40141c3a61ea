import pytest

from unirt.testing import BackendConformance


class TestOpenVINO(BackendConformance):
    known_failures = {}

    @pytest.fixture(scope="class")
    def backend(self):
        from unirt_openvino import unirt_backend

        return unirt_backend()
