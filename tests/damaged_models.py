"""One engine and many damaged copies of the digits model, in this process.

    python tests/damaged_models.py tflite                 500 of them
    python tests/damaged_models.py tflite --first 7 --count 1 --keep /tmp/damaged

Every copy is cut short or has bytes changed, as the seed and its number say. It must end
in a UnirtError or in outputs. Meanwhile the intact model, opened before, opened again now and then
and at the same path, must go on giving exactly its own outputs.

A crash of the engine is a crash of this process; a case that takes too long ends it, too, with the
tracebacks of all threads. The last line of `--progress` is then the number of the case.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
ENGINES = {"onnxruntime": "onnx", "openvino": "onnx", "tflite": "tflite", "reference": "onnx"}
SECONDS_PER_CASE = 60
MEMORY_LIMIT = 16 * 2**30  # of addresses; what a damaged size asks for beyond is refused
MOST_ELEMENTS = 2**22  # larger inputs are not worth making
REOPEN_EVERY = 10
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)


def structure(data: bytes) -> np.ndarray:
    """Where the bytes are that are not weights: outside of long rows of plausible float32."""
    weights = np.zeros(len(data), bool)
    for shift in range(4):
        floats = np.frombuffer(data, "<f4", (len(data) - shift) // 4, shift)
        with np.errstate(invalid="ignore"):
            plausible = (np.abs(floats) > 1e-8) & (np.abs(floats) < 100)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], plausible, [False]])))
        for start, stop in edges.reshape(-1, 2):
            if stop - start >= 16:
                weights[shift + 4 * start : shift + 4 * stop] = True
    return np.flatnonzero(~weights)


def damaged(data: bytes, places: np.ndarray, seed: int, number: int) -> bytes:
    """The copy of this number: cut short, or with bytes changed, in the structure or anywhere."""
    random = np.random.default_rng([seed, number])
    kind = number % 5
    if kind == 0:
        return data[: random.integers(0, len(data))]
    copy = bytearray(data)
    while copy == data:
        for _ in range(random.integers(1, 9) if kind == 3 else 1):
            place = random.integers(0, len(data)) if kind == 1 else random.choice(places)
            if kind == 4:
                copy[place] = random.choice(EXTREMES)
            else:
                copy[place] ^= 1 << random.integers(0, 8)
    return bytes(copy)


def feed(specs: Any, images: np.ndarray) -> dict[str, np.ndarray] | None:
    """Inputs that suit the specs, which damage may have changed; None if they would be huge."""
    made = {}
    for spec in specs:
        shape = images.shape
        if spec.shape is not None and len(spec.shape) == images.ndim:
            sizes = zip(spec.shape, images.shape, strict=True)
            shape = tuple(size if isinstance(size, int) else free for size, free in sizes)
        elif spec.shape is not None:
            shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
        if np.prod(shape, dtype=float) > MOST_ELEMENTS:
            return None
        if shape == images.shape and spec.dtype == "float32":
            made[spec.name] = images
        else:
            made[spec.name] = np.zeros(shape, spec.numpy_dtype)
    return made


class Fuzz:
    """`outcomes` counts how the cases ended; `wrong` says what was not as it must be."""

    def __init__(self, engine: str, seed: int, folder: Path) -> None:
        self.engine, self.seed = engine, seed
        self.path = folder / f"model.{ENGINES[engine]}"
        self.options = {"cache_dir": folder / "cache"} if engine == "openvino" else {}
        self.data = (DIGITS / f"digits.{ENGINES[engine]}").read_bytes()
        self.places = structure(self.data)
        self.images = np.load(DIGITS / "test.npz")["image"][:3]
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.digests: dict[str, bytes] = {}  # model hash -> digest of its bytes

    def start(self) -> None:
        import unirt

        self.original = unirt.Model(self.data)
        self.known(self.original, self.data)
        self.session = unirt.load(self.original, self.engine, options=self.options)
        self.expected = self.session.run({"image": self.images})

    def case(self, number: int) -> None:
        import unirt

        copy = damaged(self.data, self.places, self.seed, number)
        replace(self.path, copy)
        try:
            self.outcomes[self.run(number, copy)] += 1
        except unirt.UnirtError as error:
            self.outcomes[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001 - that there is none is what this is about
            self.complain(number, f"raised {type(error).__name__}: {error}")
        self.check_original(number)

    def run(self, number: int, copy: bytes) -> str:
        import unirt

        model = unirt.Model(self.path)
        self.known(model, copy)
        if unirt.Model(copy).hash != model.hash:
            self.complain(number, "has another hash in memory than on disk")
        answers = []
        # Again, because an engine that caches may answer from what it kept.
        for _ in range(2 if self.options else 1):
            with unirt.load(model, self.engine, options=self.options) as session:
                inputs = feed(session.inputs, self.images)
                if inputs is None:
                    return "opens, input too large to try"
                answers.append(session.run(inputs))
        if not all(same(answers[0], answer) for answer in answers[1:]):
            self.complain(number, "answers otherwise when opened again")
        return "runs, same outputs" if same(answers[0], self.expected) else "runs"

    def known(self, model: Any, data: bytes) -> None:
        """Equal hashes mean equal bytes."""
        digest = hashlib.blake2b(data).digest()
        if self.digests.setdefault(model.hash, digest) != digest:
            self.wrong.append(f"{self.engine}: two different files have the hash {model.hash}")

    def check_original(self, number: int) -> None:
        if not same(self.session.run({"image": self.images}), self.expected):
            self.complain(number, "changed what the intact model answers")
        if number % REOPEN_EVERY:
            return
        import unirt

        replace(self.path, self.data)
        model = unirt.Model(self.path)
        if model.hash != self.original.hash:
            self.complain(number, "changed the hash of the intact model")
        with unirt.load(model, self.engine, options=self.options) as session:
            if not same(session.run({"image": self.images}), self.expected):
                self.complain(number, "is confused with the intact model at the same path")

    def complain(self, number: int, what: str) -> None:
        self.wrong.append(f"{self.engine}, seed {self.seed}, case {number}: {what}")


def replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(path)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f")
        for name in one
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Damaged copies of the digits model.")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--progress", type=Path, help="write the number of each case to this file")
    parser.add_argument("--json", type=Path, help="write what happened to this file")
    parser.add_argument("--keep", type=Path, help="write the damaged files to this folder")
    given = parser.parse_args(arguments)
    limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
        fuzz = Fuzz(given.engine, given.seed, Path(folder))
        fuzz.start()
        for number in range(given.first, given.first + given.count):
            if given.progress:
                given.progress.write_text(f"{number}\n")
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                name = f"{given.engine}-{given.seed}-{number}{fuzz.path.suffix}"
                copy = damaged(fuzz.data, fuzz.places, given.seed, number)
                (given.keep / name).write_bytes(copy)
            faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
            fuzz.case(number)
            faulthandler.cancel_dump_traceback_later()
        fuzz.session.close()
    report = {"outcomes": dict(fuzz.outcomes), "wrong": fuzz.wrong}
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report))
    return int(bool(fuzz.wrong))


def limit_memory() -> None:
    if os.name == "posix":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
