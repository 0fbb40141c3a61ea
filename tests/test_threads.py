"""Many threads on one session: every call gets its own answer, and none is refused."""

import threading

import numpy as np
import pytest

import unirt
from unirt.testing import NETWORKS

THREADS, CALLS = 8, 2_000
LARGEST_BATCH = 11
ENGINES = ("onnxruntime", "openvino", "tflite", "reference")


def open_session(engine, network):
    plugin = next(plugin for plugin in unirt.backends() if plugin.name == engine)
    if not plugin.availability.available:
        pytest.skip(f"{engine}: {plugin.availability.reason}")
    return unirt.load(network.model(plugin.backend.formats), engine)


def batch(call):
    """Sizes that change from call to call, and differ between threads at any one time."""
    return 1 + call * 7 % LARGEST_BATCH


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["affine", "heavy"])
def test_each_of_many_threads_gets_its_own_answers(engine, name):
    network = NETWORKS[name]
    pool = network.sample(THREADS * CALLS + LARGEST_BATCH, 0)["x"]
    expected = network.answer({"x": pool})["y"]
    # Call number c takes some rows from row c on, so that no two calls are the same.
    answers = [[None] * CALLS for _ in range(THREADS)]
    refused = []
    ready = threading.Barrier(THREADS)

    def work(thread):
        ready.wait()
        for call in range(CALLS):
            row = thread * CALLS + call
            try:
                outputs = session.run({"x": pool[row : row + batch(row)]})
            except Exception as error:  # noqa: BLE001 - each one counts
                refused.append((thread, call, error))
            else:
                answers[thread][call] = outputs["y"]

    with open_session(engine, network) as session:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert refused == []
    # Only now, with the session closed: an answer that shared memory with another would be wrong.
    wrong = []
    for row, answer in enumerate(answer for own in answers for answer in own):
        right = expected[row : row + batch(row)]
        if answer.shape != right.shape or not np.allclose(answer, right, network.rtol, 1e-6):
            wrong.append(row)
    assert wrong == []
