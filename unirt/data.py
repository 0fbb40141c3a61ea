"""Samples for a model: read from files and mappings and checked, or random by spec and seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from unirt.arrays import admit, describe, to_array
from unirt.devices import host_devices
from unirt.errors import DataError, InputError, OptionError
from unirt.types import EXTENDED_DTYPES, Array, TensorSpec

Feed: TypeAlias = dict[str, Array]
Shapes: TypeAlias = Mapping[str, int | Sequence[int]]
DataSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Array"

LABELS = "labels"


@dataclass(frozen=True)
class Batch:
    """The inputs of one call, the labels of its rows, and how many rows count: the rest pads."""

    inputs: Feed
    labels: Array | None
    count: int


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of many calls, with their labels where there are any. Arrays are views, not copies.

    Axis 0 of each array counts the samples. They are rows of the batch axis, of which a call takes
    `fixed_batch` where the model's is fixed; or whole inputs of one call each if `stacked`, and
    then `rows` says how many samples one such call holds. Arrays named in `shared` have no such
    axis: every call gets them whole.
    """

    inputs: Mapping[str, Array]
    count: int
    labels: Array | None = None
    stacked: bool = False
    fixed_batch: int | None = None
    rows: int = 1
    shared: frozenset[str] = field(default_factory=frozenset)
    description: str = ""

    def call_size(self, wanted: int | None, default: int = 1) -> int:
        """How many entries of axis 0 one call takes. Raises DataError where `wanted` cannot be."""
        fixed = 1 if self.stacked else self.fixed_batch
        if wanted is None:
            return fixed or default
        if fixed is not None and wanted != fixed * self.rows:
            raise DataError(
                f"The model cannot be called with batches of {wanted}.",
                "Its batch is fixed, or the data holds whole inputs, of which a call takes one: "
                f"{fixed * self.rows} sample{'s' * (fixed * self.rows != 1)} a call.",
                "Leave the batch out, or export the model with a dynamic batch axis.",
                batch=wanted,
            )
        if fixed is None and wanted > self.count:
            raise DataError(
                f"There are fewer samples than the {wanted} of one call.",
                f"The data holds {self.count}.",
                "Give a smaller batch, or more samples.",
                batch=wanted,
            )
        return fixed or wanted

    def batches(self, size: int) -> Iterator[Batch]:
        """Every sample once, `size` a call. The last call is smaller, or where the model's batch is
        fixed filled up with samples from the start, which do not count.
        """
        for start in range(0, self.count, size):
            count = min(size, self.count - start)
            taken = size if self.fixed_batch is not None else count
            yield Batch(
                self._take(start, taken),
                None if self.labels is None else _rows(self.labels, start, taken, self.stacked),
                count,
            )

    def feeds(self, size: int, limit: int) -> list[Feed]:
        """The inputs of up to `limit` calls, all of the same size and as different as can be."""
        calls = max(1, min(limit, self.count // size))
        return [self._take(index * size, size) for index in range(calls)]

    def calls(self, *sizes: int) -> list[Feed]:
        """One call of each size, and one of the smallest there may be: the shapes to expect."""
        smallest = [] if self.stacked or self.fixed_batch is not None else [1]
        return [self._take(0, size) for size in (*sizes, *smallest)]

    def _take(self, start: int, size: int) -> Feed:
        return {
            name: value if name in self.shared else _rows(value, start, size, self.stacked)
            for name, value in self.inputs.items()
        }


def _rows(value: Array, start: int, size: int, stacked: bool) -> Array:
    if stacked:
        single: Array = value[start, ...]
        return single
    if start + size <= len(value):
        return value[start : start + size]
    return value.take(np.arange(start, start + size) % len(value), axis=0)


def samples_for(
    specs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    source: DataSource | None,
    *,
    calls: int,
    seed: int,
    batch: int | None,
    shapes: Shapes | None,
) -> Samples:
    """`load_samples` of the source, or `random_samples` without one. Raises OptionError too."""
    if source is None:
        return random_samples(specs, outputs, calls=calls, seed=seed, batch=batch, shapes=shapes)
    if shapes:
        raise OptionError(
            "Shapes do not go with data.",
            "They shape random inputs, and the data has its own.",
            "Leave the data or the shapes out.",
            shapes=dict(shapes),
        )
    return load_samples(specs, source)


def load_samples(specs: Sequence[TensorSpec], source: DataSource) -> Samples:
    """The samples in a .npz or .npy file, a mapping, or for a single input a bare array.

    Arrays are named as the model's inputs, with the input's rank and samples along its first axis,
    or with one rank more: then each entry is a whole input. `labels` may stand beside them: class
    numbers, one for each sample (or [samples, ...] for networks that classify more than once).
    Nothing is cast, and nothing is ever unpickled. Raises DataError.
    """
    arrays, described = _named_arrays(specs, source)
    names = [spec.name for spec in specs]
    raw_labels = None if LABELS in names else arrays.pop(LABELS, None)
    _check_names(names, arrays, described)
    values = {spec.name: _value(arrays[spec.name], spec) for spec in specs}
    stacked, shared = _layout(specs, values)
    counts = {name: len(value) for name, value in values.items() if name not in shared}
    labels = None if raw_labels is None else _labels(raw_labels)
    lengths = counts if labels is None else {**counts, LABELS: len(labels)}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(
            f"The arrays of {described} are of unequal length.",
            f"Axis 0 counts the samples, and there are: {told}.",
            "Cut them to the same samples; where an input's first axis is no batch axis, stack "
            "whole inputs along a new first axis.",
            lengths=lengths,
        )
    count = next(iter(lengths.values()), 1)
    if count == 0:
        raise DataError(
            f"There are no samples in {described}.",
            "Axis 0 counts the samples, and it is 0.",
            "Give at least one.",
        )
    samples = Samples(
        values,
        count,
        labels,
        stacked,
        None if stacked else _fixed_batch(specs, shared),
        shared=shared,
        description=f"{count:,} sample{'s' * (count != 1)} of {described}"
        + (" with labels" if labels is not None else ""),
    )
    try:
        admit(samples.feeds(samples.call_size(None), 1)[0], tuple(specs), "cpu")
    except InputError as error:
        raise _as_data_error(error) from error
    return samples


def random_samples(
    specs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec] = (),
    *,
    calls: int,
    seed: int = 0,
    batch: int | None = None,
    shapes: Shapes | None = None,
) -> Samples:
    """Random inputs of `calls` calls, each with `batch` rows where the first axis is dynamic.

    A fixed first axis counts as rows only where the `outputs` begin with it too. `shapes` is as for
    `random_inputs`. Raises DataError.
    """
    given = dict(shapes or {})
    if batch is not None:
        for spec in specs:
            if not spec.shape or spec.name in given:
                continue
            first = spec.shape[0]
            if isinstance(first, str):
                given.setdefault(first, batch)
            elif first is None:
                rest = (given.get(size, 1) if isinstance(size, str) else size or 1
                        for size in spec.shape[1:])  # fmt: skip
                given[spec.name] = (batch, *(size for size in rest if isinstance(size, int)))
    feeds = [random_inputs(specs, seed=seed + call, shapes=given) for call in range(calls)]
    stacked = {spec.name: np.stack([feed[spec.name] for feed in feeds]) for spec in specs}
    firsts = {value.shape[1] for value in stacked.values() if value.ndim > 1}
    rows = firsts.pop() if len(firsts) == 1 else 1
    if all(isinstance(spec.shape[0], int) for spec in specs if spec.shape) and not all(
        spec.shape is None or spec.shape[:1] in ((rows,), (None,)) for spec in outputs
    ):
        rows = 1
    shapes_text = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in stacked.items())
    samples = Samples(
        stacked,
        calls,
        stacked=True,
        rows=max(1, rows),
        description=f"random inputs, seed {seed}" + (f": {shapes_text}" if shapes_text else ""),
    )
    samples.call_size(batch)
    return samples


def random_inputs(
    specs: Sequence[TensorSpec], *, seed: int = 0, shapes: Shapes | None = None
) -> Feed:
    """One random value for each input: the same for the same specs, seed and shapes.

    Floats are standard normal, ints from 0 to 9 as far as their type goes, bools and strings
    arbitrary. A dynamic size is 1 unless `shapes` says otherwise, by symbol (`{"batch": 4}`) or by
    input (`{"image": (1, 3, 224, 224)}`). Raises DataError, for an unknown rank too.
    """
    shapes = dict(shapes or {})
    symbols = {size for spec in specs for size in spec.shape or () if isinstance(size, str)}
    unknown = [key for key in shapes if key not in symbols | {spec.name for spec in specs}]
    if unknown:
        raise DataError(
            f"There is no input and no symbol {unknown[0]!r} to give a shape to.",
            f"The model takes {'; '.join(map(str, specs)) or 'no inputs'}.",
            "Name one of its inputs, or a symbol in their shapes.",
            name=unknown[0],
        )
    rng = np.random.default_rng(seed)
    return {spec.name: _random(spec, concrete_shape(spec, shapes), rng) for spec in specs}


def concrete_shape(spec: TensorSpec, shapes: Shapes) -> tuple[int, ...]:
    """The spec's shape with every dynamic size given a number; 1 by default. Raises DataError."""
    given = shapes.get(spec.name)
    if given is not None and not (isinstance(given, int) and spec.shape and len(spec.shape) != 1):
        shape = (given,) if isinstance(given, int) else tuple(given)
        fits = spec.shape is None or (
            len(shape) == len(spec.shape)
            and all(
                not isinstance(wanted, int) or size == wanted
                for size, wanted in zip(shape, spec.shape, strict=True)
            )
        )
        if not fits or any(size < 0 for size in shape):
            raise DataError(
                f"Input {spec.name!r} cannot have the shape {list(shape)}.",
                f"The model takes {spec}.",
                "Change only sizes that are symbols or question marks.",
                name=spec.name,
            )
        return shape
    if spec.shape is None:
        raise DataError(
            f"The shape of input {spec.name!r} is not known.",
            "The model does not even tell its rank, so that no input can be made up.",
            f"Say it: shapes={{{spec.name!r}: (1, 3)}}, or --shape {spec.name}=1,3.",
            name=spec.name,
        )
    shape = ()
    for size in spec.shape:
        value = shapes.get(size, 1) if isinstance(size, str) else size
        value = 1 if value is None else value
        if not isinstance(value, int) or value < 0:
            raise DataError(
                f"The symbol {size!r} cannot be {value!r}.",
                "A symbol in a shape stands for one size.",
                f"Give a whole number: {size}=4.",
                symbol=size,
            )
        shape += (value,)
    return shape


def _random(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if spec.kind != "tensor":
        raise DataError(
            f"Input {spec.name!r} is a {spec.kind}.",
            "Random values are made for tensors only.",
            "Pass the inputs yourself.",
            name=spec.name,
        )
    try:
        if spec.dtype == "string":
            words = [f"text {number}" for number in rng.integers(0, 10, int(np.prod(shape)))]
            return np.array(words, dtype=object).reshape(shape)
        dtype = spec.numpy_dtype
        if dtype == np.bool_:
            return rng.integers(0, 2, shape).astype(np.bool_)
        if dtype.kind in "iu" or "int" in spec.dtype:
            # Small and not negative: they may be token or row numbers.
            high = {"int2": 2, "uint2": 4, "int4": 8}.get(spec.dtype, 10)
            return rng.integers(0, high, shape).astype(dtype)
        normal = np.asarray(rng.standard_normal(shape))
        if dtype.kind == "c":
            return (normal + 1j * rng.standard_normal(shape)).astype(dtype)
        return (np.abs(normal) if spec.dtype == "float8_e8m0fnu" else normal).astype(dtype)
    except (MemoryError, ValueError, ImportError, TypeError) as error:
        raise DataError(
            f"No random value of {spec.dtype} {list(shape)} can be made for {spec.name!r}.",
            f"{type(error).__name__}: {error}.",
            "Give smaller shapes, or pass the inputs yourself.",
            name=spec.name,
        ) from error


# --- reading -------------------------------------------------------------------------------------


def _named_arrays(specs: Sequence[TensorSpec], source: DataSource) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return dict(source), "the data"
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        names = {spec.name for spec in specs} | {LABELS}
        read = read_arrays(path, only=names)
        described = path.name
    else:
        read, described = source, "the data"
    if isinstance(read, dict):
        return read, described
    if len(specs) != 1:
        raise DataError(
            f"{described} holds one array without a name.",
            f"The model has {len(specs)} inputs: {'; '.join(map(str, specs))}.",
            "Give a .npz file or a dict with an array for each.",
        )
    return {specs[0].name: read}, described


def read_arrays(path: Path, only: set[str] | None = None) -> dict[str, Array] | Array:
    """The arrays of a .npz file by name, or the one array of a .npy file.

    With `only`, arrays of other names are listed as they are, without being read: their value is an
    empty array. Object arrays are refused, since reading them runs code. Raises DataError.
    """
    if not path.is_file():
        raise DataError(
            f"There is no data file {path}.",
            "The path names nothing, or something that is not a file.",
            "Check the path; data is a .npz or .npy file.",
            path=path,
        )
    import zipfile
    import zlib

    try:
        with path.open("rb") as stream:
            if zipfile.is_zipfile(stream):
                return _read_npz(path, only)
            stream.seek(0)
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return array
    except DataError:
        raise
    except (
        ValueError,
        OSError,
        EOFError,
        LookupError,
        MemoryError,
        RuntimeError,  # NotImplementedError too: encrypted, or packed in a way zipfile lacks
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        pickled = "allow_pickle" in str(error)
        raise DataError(
            f"{path.name} cannot be read.",
            "It holds Python objects, and unpickling them could run any code."
            if pickled
            else f"It is no .npz or .npy file, or it is damaged: {error or type(error).__name__}.",
            "Save plain arrays with numpy.savez; text as a `str` array, not as objects.",
            path=path,
        ) from error


def _read_npz(path: Path, only: set[str] | None) -> dict[str, Array]:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    available = host_devices()[0].facts.get("available_memory_bytes")
    if available is not None and size > available:
        raise DataError(
            f"{path.name} does not fit into memory.",
            f"Unpacked it has {size:,} bytes, and {available:,} are free.",
            "Give a part of it.",
            path=path,
        )
    with np.load(path, allow_pickle=False) as arrays:
        return {
            name: arrays[name] if only is None or name in only else np.empty(0)
            for name in arrays.files
        }


def _check_names(names: Sequence[str], arrays: Mapping[str, object], described: str) -> None:
    missing = [name for name in names if name not in arrays]
    extra = [name for name in arrays if name not in names]
    if not missing and not extra:
        return
    told = [f"missing: {', '.join(missing)}"] if missing else []
    told += [f"unknown: {', '.join(map(str, extra))}"] if extra else []
    raise DataError(
        f"The arrays of {described} do not match the model ({'; '.join(told)}).",
        f"It holds {', '.join(map(str, arrays)) or 'none'}; the model takes "
        f"{', '.join(names) or 'no inputs'}.",
        f"Name the arrays as the inputs; class numbers may stand beside them as {LABELS!r}.",
        missing=missing,
        extra=extra,
    )


def _value(value: Any, spec: TensorSpec) -> Array:
    if spec.kind != "tensor":
        raise DataError(
            f"Input {spec.name!r} is a {spec.kind}.",
            "Data files hold tensors only.",
            "Run this model with Session.run and inputs of your own.",
            name=spec.name,
        )
    try:
        array: Array = to_array(value, spec, "cpu")
    except InputError as error:
        raise _as_data_error(error) from error
    # .npy files do not know the types of ml_dtypes: they come back as so many bytes.
    raw = spec.dtype in EXTENDED_DTYPES and array.dtype == f"V{spec.numpy_dtype.itemsize}"
    return array.view(spec.numpy_dtype) if raw else array


def _as_data_error(error: InputError) -> DataError:
    return DataError(error.what, error.why, error.remedy, **error.facts)


def _layout(
    specs: Sequence[TensorSpec], values: Mapping[str, Array]
) -> tuple[bool, frozenset[str]]:
    """Whether entries are whole inputs, and which arrays are for every call."""
    batched: list[str] = []
    stacked: list[str] = []
    shared: list[str] = []
    for spec in specs:
        rank = values[spec.name].ndim
        wanted = max(rank, 1) if spec.shape is None else len(spec.shape)
        if rank == wanted:
            (batched if rank else shared).append(spec.name)
        elif rank == wanted + 1:
            stacked.append(spec.name)
        else:
            raise DataError(
                f"The array {spec.name!r} is {describe(values[spec.name])}.",
                f"The model takes {spec}: with samples along axis 0 that is rank {wanted}, or "
                f"rank {wanted + 1} for whole inputs.",
                "Reshape the array.",
                name=spec.name,
            )
    if batched and stacked:
        raise DataError(
            f"The arrays {batched[0]!r} and {stacked[0]!r} count samples differently.",
            f"Axis 0 of {batched[0]!r} is the model's own; {stacked[0]!r} has one axis more.",
            "Stack whole inputs along a new first axis for all of them.",
        )
    return bool(stacked), frozenset(shared)


def _fixed_batch(specs: Sequence[TensorSpec], shared: frozenset[str]) -> int | None:
    firsts = {spec.name: spec.shape[0] for spec in specs if spec.shape and spec.name not in shared}
    fixed = {size for size in firsts.values() if isinstance(size, int)}
    if len(fixed) > 1 or 0 in fixed:
        told = ", ".join(f"{name} {size}" for name, size in firsts.items())
        raise DataError(
            "The first axis of the inputs is no batch axis.",
            f"Its sizes differ: {told}.",
            "Stack whole inputs along a new first axis.",
        )
    return fixed.pop() if fixed else None


def _labels(value: Any) -> Array:
    problem = ""
    try:
        labels = np.asarray(value)
    except (ValueError, TypeError) as error:
        labels, problem = np.empty(0), f"they are no array: {error}"
    if problem:
        pass
    elif labels.dtype.kind == "f" and np.isnan(labels).any():
        problem = f"{int(np.isnan(labels).sum())} of them are NaN"
    elif labels.dtype.kind not in "iu":
        problem = f"they are {labels.dtype}"
    elif labels.ndim == 0:
        problem = "they are a single number without an axis"
    elif labels.size and int(labels.min()) < 0:
        problem = f"one is {int(labels.min())}"
    if problem:
        raise DataError(
            "The labels cannot be used.",
            f"A label is the number of a class, an integer from 0, but {problem}.",
            "Drop samples without a label, and store class numbers as integers.",
        )
    return labels
