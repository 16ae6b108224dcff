"""Every kind of source gives the same tokens, from any token on."""

import subprocess
import sys

import numpy
import pyarrow
import pytest
import torch
from pyarrow import feather, parquet
from safetensors.torch import save_file

from ray_abliterate.errors import TokenSourceError
from ray_abliterate.evaluation.streaming import TokenSource, open_source
from ray_abliterate.evaluation.streaming.token_sources import TokenCursor
from tests.evaluation.streaming.conftest import text_of

IDS = text_of(1000)


class Characters:
    """A tokenizer: a token is a character's number; 0 ends a row."""

    eos_token_id = 0
    name_or_path = "characters"

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) for c in text]


def tokens(source, start=0):
    return torch.cat([torch.empty(0, dtype=torch.int64), *source.blocks(start)])


def npy(folder):
    numpy.save(folder / "t.npy", IDS.numpy().astype(numpy.uint16))
    return folder / "t.npy"


def binary(folder):
    IDS.numpy().astype("<u2").tofile(folder / "t.bin")
    return str(folder / "t.bin")


def safetensors(folder):
    save_file({"tokens": IDS.to(torch.int32), "other": torch.zeros(3)}, folder / "t.safetensors")
    return folder / "t.safetensors"


def parquet_ids(folder):
    table = pyarrow.table({"tokens": pyarrow.array(IDS.tolist())})
    parquet.write_table(table, folder / "t.parquet")
    return folder / "t.parquet"


def parquet_lists(folder):
    rows = [IDS[i : i + 70].tolist() for i in range(0, 1000, 70)]
    parquet.write_table(
        pyarrow.table({"input_ids": rows, "text": ["a"] * 15}), folder / "l.parquet"
    )
    return folder / "l.parquet"


def arrow_stream(folder):
    table = pyarrow.table({"tokens": pyarrow.array(IDS.tolist())})
    with pyarrow.ipc.new_stream(str(folder / "t.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=300)
    return folder / "t.arrow"


def arrow_file(folder):
    table = pyarrow.table({"tokens": pyarrow.array(IDS.tolist())})
    feather.write_feather(table, folder / "t.feather", compression="uncompressed")
    return folder / "t.feather"


KINDS = {
    "tensor": lambda _: IDS,
    "int32 tensor": lambda _: IDS.int(),
    "array": lambda _: IDS.numpy().astype(numpy.uint32),
    "list": lambda _: IDS.tolist(),
    "iterator of blocks": lambda _: iter(IDS.split(70)),
    "iterator of lists": lambda _: (IDS[i : i + 9].tolist() for i in range(0, 1000, 9)),
    "iterator of tokens": lambda _: iter(IDS[:].tolist()),
    "npy": npy,
    "bin": binary,
    "safetensors": safetensors,
    "parquet of ids": parquet_ids,
    "parquet of lists": parquet_lists,
    "arrow stream": arrow_stream,
    "arrow file": arrow_file,
}


@pytest.mark.parametrize("start", [0, 1, 333, 999, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_tokens_from_any_one_on(kind, start, tmp_path):
    source = open_source(KINDS[kind](tmp_path))
    assert isinstance(source, TokenSource)
    assert torch.equal(tokens(source, start), IDS[start:])
    assert source.length in (None, 1000)


@pytest.mark.parametrize("kind", ["npy", "bin", "safetensors", "parquet of lists", "array"])
def test_a_source_is_told_from_others_by_what_it_holds(kind, tmp_path):
    one = open_source(KINDS[kind](tmp_path)).fingerprint
    assert one == open_source(KINDS[kind](tmp_path)).fingerprint
    IDS[999] ^= 1
    try:
        assert one != open_source(KINDS[kind](tmp_path)).fingerprint
    finally:
        IDS[999] ^= 1


def test_a_text_file_is_tokenized_in_pieces_that_end_where_lines_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_abliterate.evaluation.streaming.text_sources.PIECE", 16)
    text = "one\ntwo and three\n\nfour\r\n" * 20 + "é" * 200 + "no newline at the end"
    (tmp_path / "t.txt").write_bytes(text.encode())
    source = open_source(tmp_path / "t.txt", Characters())
    assert tokens(source).tolist() == [ord(c) for c in text]
    assert tokens(source, 100).tolist() == [ord(c) for c in text[100:]]
    pieces = list(source._texts.pieces(None))
    assert len(pieces) > 10 and all(p.endswith("\n") for p in pieces[:20])


def test_rows_of_a_table_end_with_the_tokenizers_end_token(tmp_path):
    table = pyarrow.table({"title": ["x", "y", "z"], "text": ["ab", None, "c"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet", Characters())
    assert tokens(source).tolist() == [97, 98, 0, 99, 0]
    titles = open_source(tmp_path / "t.parquet", Characters(), column="title")
    assert tokens(titles).tolist() == [120, 0, 121, 0, 122, 0]


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return iter([{"text": "ab"}, {"text": ""}, {"text": "c"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = open_source("hub:owner/name", Characters(), split="test", revision="abc")
    assert tokens(source).tolist() == [97, 98, 0, 99, 0]
    assert asked["streaming"] is True
    assert (asked["name"], asked["split"], asked["revision"]) == ("owner/name", "test", "abc")


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def load_dataset(*_, **__):
        raise OSError("no such data set hf_abcdefghijklmnopqrst")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(TokenSourceError, match=r"hub:owner/name: no such data set …\n  "):
        tokens(open_source("hub:owner/name", Characters()))


def wrong(folder, kind):
    if kind == "text":
        (folder / "t.txt").write_text("ab")
        return {"spec": folder / "t.txt"}
    if kind == "binary text":
        (folder / "t.txt").write_bytes(b"\xff\xfe\x00")
        return {"spec": folder / "t.txt", "tokenizer": Characters()}
    if kind == "column":
        parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), folder / "t.parquet")
        return {"spec": folder / "t.parquet", "column": "c"}
    if kind == "no usual column":
        parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), folder / "t.parquet")
        return {"spec": folder / "t.parquet"}
    if kind == "broken table":
        (folder / "t.parquet").write_bytes(b"no table")
        return {"spec": folder / "t.parquet"}
    if kind == "dtype":
        (folder / "t.bin").write_bytes(b"abc")
        return {"spec": folder / "t.bin", "dtype": "uint8x"}
    if kind == "two tensors":
        save_file({"a": IDS, "b": IDS + 1}, folder / "t.safetensors")
        return {"spec": folder / "t.safetensors"}
    if kind == "floats":
        save_file({"a": torch.zeros(3)}, folder / "t.safetensors")
        return {"spec": folder / "t.safetensors"}
    return {"spec": 7} if kind == "number" else {"spec": folder / "absent.npy"}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", r"is text, and tokenizer is not set.\n  Give the model's tokenizer"),
        ("binary text", "is not UTF-8 text"),
        ("column", r"has no column 'c'.\n  Set column to one of: a, b"),
        ("no usual column", "none of the columns tokens, input_ids, text"),
        ("broken table", "cannot be read"),
        ("dtype", r"dtype = 'uint8x'.*\n  Set dtype"),
        ("two tensors", "holds a, b; expected one tensor, or one that is named tokens"),
        ("floats", "a is F32; tokens are integers"),
        ("number", r"source = 7 \(int\) is no source of tokens"),
        ("absent", r"is not a file .*\n  Give a file that exists, or hub:owner/name"),
    ],
)
def test_what_cannot_be_read_says_what_was_found_and_what_to_change(kind, says, tmp_path):
    with pytest.raises(TokenSourceError, match=says):
        tokens(open_source(**wrong(tmp_path, kind)))


def test_an_iterator_is_read_once_and_then_says_so():
    source = open_source(iter([IDS]))
    tokens(source)
    with pytest.raises(TokenSourceError, match="can't begin again"):
        tokens(source)


def test_blocks_that_are_no_tokens_are_refused():
    with pytest.raises(TokenSourceError, match="yields list, not token ids"):
        tokens(open_source(iter([[0.5]])))
    with pytest.raises(TokenSourceError, match="yields str, not token ids"):
        tokens(open_source(iter(["text"])))


def test_a_tape_holds_no_more_than_was_asked_for_and_a_block():
    tape = TokenCursor(open_source(iter(IDS.split(10))), 0, None, 97)
    for first in range(0, 900, 50):
        assert torch.equal(tape.read(first, first + 60), IDS[first : first + 60])
        assert len(tape._buffer) <= 70


def test_a_token_file_is_not_read_into_memory(tmp_path):
    path = npy(tmp_path)
    assert isinstance(open_source(path)._values, numpy.memmap)
    assert isinstance(open_source(binary(tmp_path))._values, numpy.memmap)
    assert isinstance(open_source(safetensors(tmp_path))._values, numpy.memmap)


def test_the_library_runs_without_ray():
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "import ray_abliterate.evaluation.streaming as s\n"
        "print(s.StreamingEvaluator.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "StreamingEvaluator", done.stderr
