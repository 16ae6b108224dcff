"""Residual shards: Arrow and back, checksums, and sums that don't depend on who added them."""

import pickle
import subprocess
import sys
from functools import reduce
from operator import add
from pathlib import Path

import numpy
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_abliterate.data.atomic_files import cache_root, link_atomically, write_atomically
from ray_abliterate.directions.residuals.folds import project_shard
from ray_abliterate.directions.residuals.shard import (
    DamagedShard,
    ResidualShard,
    content_key,
    sums_of,
    winsorized,
)
from ray_abliterate.directions.residuals.shard_files import ShardFiles, ShardFolder
from ray_abliterate.errors import ModelError
from ray_abliterate.recipe import RunSettings

KEY = content_key(weights="abc")


def some(prompts: int = 4, layers: int = 3, hidden: int = 5, seed: int = 0) -> numpy.ndarray:
    random = numpy.random.default_rng(seed)
    values: numpy.ndarray = random.standard_normal((prompts, layers, hidden), numpy.float32)
    return values


def split(values: numpy.ndarray, rows: int, dtype: str = "float32") -> list[ResidualShard]:
    starts = range(0, len(values), rows)
    return [ResidualShard.of("behaviour", i, values[i : i + rows], dtype) for i in starts]


# Arrow


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_shard_has_a_row_per_prompt_and_a_column_per_layer(dtype: str) -> None:
    values = some()
    shard = ResidualShard.of("behaviour", 8, values, dtype)
    columns = {field.name: field.type for field in shard.batch.schema}
    of_lists = pyarrow.list_(pyarrow.float32() if dtype == "float32" else pyarrow.float16(), 5)
    assert columns == {
        "prompt": pyarrow.int32(), "set": pyarrow.string(),
        "layer-0": of_lists, "layer-1": of_lists, "layer-2": of_lists,
    }  # fmt: skip
    assert shard.batch.column("prompt").to_pylist() == [8, 9, 10, 11]
    assert (shard.name, shard.first, shard.prompts, shard.layers) == ("behaviour", 8, 4, 3)
    assert numpy.array_equal(shard.values(), values.astype(dtype).astype(numpy.float32))
    assert shard.values().dtype == numpy.float32


def test_a_layer_is_read_alone_without_a_copy_and_cannot_be_written() -> None:
    shard = ResidualShard.of("behaviour", 0, some())
    layer = shard.layer(1)
    buffer = shard.batch.column("layer-1").flatten().buffers()[1]
    assert layer.__array_interface__["data"] == (buffer.address, True)
    with pytest.raises(ValueError, match="read-only"):
        layer[0, 0] = 1.0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_gives_back_the_same_bits(dtype: str) -> None:
    shard = ResidualShard.of("neutral", 6, some(), dtype)
    again = ResidualShard.from_file(shard.to_file(KEY), KEY)
    assert again is not None
    assert again.batch.equals(shard.batch)
    assert again.layer(2).tobytes() == shard.layer(2).tobytes()


def test_a_file_of_another_key_is_not_taken() -> None:
    data = ResidualShard.of("neutral", 6, some()).to_file(KEY)
    assert ResidualShard.from_file(data, content_key(weights="abd")) is None
    assert ResidualShard.from_file(data) is not None


FILE = ResidualShard.of("neutral", 6, some(2, 2, 4)).to_file(KEY)


@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_a_changed_byte_never_gives_other_values(place: int, change: int) -> None:
    data = bytearray(FILE)
    data[place] ^= change
    try:
        found = ResidualShard.from_file(bytes(data), KEY)
    except DamagedShard:
        return
    original = ResidualShard.from_file(FILE, KEY)
    assert found is not None and original is not None  # padding and names of children don't matter
    assert found.batch.equals(original.batch)


def test_a_changed_value_is_detected_by_the_checksum() -> None:
    value = some(2, 2, 4)[1, 1, 2].tobytes()
    place = FILE.index(value)
    data = FILE[:place] + bytes([value[0] ^ 1]) + FILE[place + 1 :]
    with pytest.raises(DamagedShard, match="checksum"):
        ResidualShard.from_file(data, KEY)


@pytest.mark.parametrize("length", [0, 7, 100, len(FILE) // 2, len(FILE) - 1])
def test_a_torn_file_is_detected(length: int) -> None:
    with pytest.raises(DamagedShard):
        ResidualShard.from_file(FILE[:length], KEY)


def test_a_value_that_is_not_finite_names_prompt_and_layer_and_what_to_do() -> None:
    values = some()
    values[2, 1, 0] = numpy.inf
    with pytest.raises(ModelError, match=r"prompt 10 after layer 1 is not finite.*model\.dtype"):
        ResidualShard.of("behaviour", 8, values)


def test_a_value_beyond_float16_is_refused_there_and_stored_in_float32() -> None:
    values = some()
    values[3, 0, 4] = 1e5
    assert ResidualShard.of("behaviour", 0, values).values()[3, 0, 4] == 1e5
    with pytest.raises(ModelError, match=r"prompt 3 after layer 0.*direction\.residual_dtype"):
        ResidualShard.of("behaviour", 0, values, "float16")


# Sums


@given(st.integers(1, 30), st.integers(1, 9), st.sampled_from([1.0, 0.8]))
def test_sums_of_shards_are_the_sums_of_the_set_up_to_float64_rounding(
    prompts: int, rows: int, quantile: float
) -> None:
    values = some(prompts, 2, 16, seed=prompts)
    values[0] *= 1000
    layers = [winsorized(values[:, layer], quantile).astype(numpy.float64) for layer in range(2)]
    found = reduce(add, [sums_of(shard.batch, quantile) for shard in split(values, rows)])
    assert found.prompts == prompts
    expected = numpy.stack([layer.mean(axis=0) for layer in layers])
    numpy.testing.assert_allclose(found.mean, expected, rtol=1e-12, atol=1e-12)


def test_sums_hold_more_digits_than_the_values_have() -> None:
    values = numpy.full((3, 1, 1), 0.1, numpy.float32)
    values[0] = 1e8
    total = sums_of(ResidualShard.of("neutral", 0, values).batch).totals[0, 0]
    assert total == pytest.approx(1e8 + 2 * float(values[1, 0, 0]), rel=1e-15)
    half = ResidualShard.of("neutral", 0, numpy.full((4096, 1, 1), 1.5), "float16")
    assert sums_of(half.batch).totals[0, 0] == 6144


@given(st.integers(1, 20), st.integers(1, 9))
def test_sums_and_projections_have_the_same_bits_from_memory_and_from_a_file(
    prompts: int, rows: int
) -> None:
    vectors, folds = some(2, 2, 16, seed=99), numpy.arange(prompts) % 2
    for shard in split(some(prompts, 2, 16), rows):
        again = ResidualShard.from_file(shard.to_file(KEY), KEY)
        assert again is not None
        for function, more in ((sums_of, ()), (project_shard, (vectors, folds))):
            one, other = function(shard.batch, *more), function(again.batch, *more)
            assert pickle.dumps(one) == pickle.dumps(other)


# Keys and files


def test_making_reading_and_adding_shards_loads_no_pandas() -> None:
    script = """
import sys, numpy
from ray_abliterate.directions.residuals.shard import ResidualShard, sums_of
shard = ResidualShard.of("behaviour", 0, numpy.ones((4, 3, 5)))
back = ResidualShard.from_file(shard.to_file("key"), "key")
assert back.values().shape == (4, 3, 5) and back.name == "behaviour"
assert sums_of(back.batch).prompts == 4
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_key_depends_on_every_fact_and_on_nothing_else() -> None:
    assert content_key(a=1, b="x") == content_key(b="x", a=1)
    keys = {content_key(a=1, b="x"), content_key(a=2, b="x"), content_key(a=1, b="y")}
    assert len(keys) == 3


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def files(tmp_path: Path, notes: list[str]) -> ShardFiles:
    return ShardFiles(ShardFolder(tmp_path / "run"), tmp_path / "cache", notes.append)


def cached(folder: Path) -> Path:
    return folder / "cache" / KEY / "behaviour-00002.arrow"


def test_a_shard_is_stored_by_one_run_and_read_by_another(
    files: ShardFiles, tmp_path: Path, notes: list[str]
) -> None:
    shard = ResidualShard.of("behaviour", 8, some())
    assert files.find("behaviour", 2, KEY) is None
    files.store(shard, 2, KEY)
    own = tmp_path / "run" / "behaviour-00002.arrow"
    assert own.samefile(cached(tmp_path))
    other = ShardFiles(ShardFolder(tmp_path / "other"), tmp_path / "cache", notes.append)
    found = other.find("behaviour", 2, KEY)
    assert found is not None and found.batch.equals(shard.batch)
    assert own.samefile(tmp_path / "other" / "behaviour-00002.arrow")
    assert other.find("behaviour", 2, content_key()) is None
    assert not notes
    assert not [f for f in tmp_path.rglob(".*") if f.is_file()]


def test_a_damaged_file_is_noted_and_the_good_one_put_in_its_place(
    files: ShardFiles, tmp_path: Path, notes: list[str]
) -> None:
    shard = ResidualShard.of("behaviour", 8, some())
    files.store(shard, 2, KEY)
    own = tmp_path / "run" / "behaviour-00002.arrow"
    good = own.read_bytes()
    own.unlink()
    own.write_bytes(good[:-50])
    found = files.find("behaviour", 2, KEY)
    assert found is not None and found.batch.equals(shard.batch)
    assert own.read_bytes() == good
    assert len(notes) == 1 and str(own) in notes[0] and "damaged" in notes[0]


def test_a_shard_that_is_damaged_in_both_places_has_to_be_made_again(
    files: ShardFiles, tmp_path: Path, notes: list[str]
) -> None:
    shard = ResidualShard.of("behaviour", 8, some())
    files.store(shard, 2, KEY)
    file = cached(tmp_path)
    data = bytearray(file.read_bytes())
    data[data.index(some()[3, 2, 1].tobytes())] ^= 1
    with file.open("r+b") as both:
        both.write(data)
    assert files.find("behaviour", 2, KEY) is None
    assert len(notes) == 2
    files.store(shard, 2, KEY)
    assert files.find("behaviour", 2, KEY) is not None
    assert len(notes) == 2


def test_a_cache_that_cannot_be_written_is_one_note_and_no_error(
    tmp_path: Path, notes: list[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    for own in (ShardFolder(tmp_path / "run"), None):
        files = ShardFiles(own, tmp_path / "cache", notes.append)
        for number in (0, 1):
            if files.stores:
                files.store(ResidualShard.of("behaviour", 4 * number, some()), number, KEY)
        assert files.stores == (own is not None)
        assert len(notes) == 1 and "not shared" in notes.pop()
    assert len(list(ShardFolder(tmp_path / "run").read_all("behaviour"))) == 2


def test_the_recipe_says_where_shards_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path / "cache"))
    shard = ResidualShard.of("behaviour", 0, some())
    for own, shared in ((True, True), (True, False), (False, True), (False, False)):
        settings = RunSettings(save_residuals=own, residual_cache=shared)
        folder, key = ShardFolder(tmp_path / f"{own}-{shared}"), content_key(own=own, s=shared)
        files = ShardFiles.of(settings, folder, notes.append)
        assert files.stores == (own or shared)
        if files.stores:
            files.store(shard, 0, key)
        assert folder.path.exists() == own
        assert (tmp_path / "cache" / "residuals" / key).exists() == shared


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ABLITERATE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "ray_abliterate"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/ray_abliterate")
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", "/y")
    assert cache_root() == Path("/y")


def test_linking_a_file_to_itself_leaves_it_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_atomically(file, b"x")
    link_atomically(tmp_path / "b", file)
    link_atomically(tmp_path / "b", file)
    assert (tmp_path / "b").read_bytes() == b"x"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_is_copied_where_it_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", across)
    write_atomically(tmp_path / "a", b"x")
    link_atomically(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == b"x"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
