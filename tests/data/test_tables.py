"""Rows of tables with their places, from every kind of source."""

import json
import tracemalloc
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from ray_abliterate.data import hub
from ray_abliterate.data.tables import resume_on_error, stream_table
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import TableSource

ROWS = [{"text": f"word {n}", "label": n, "list": ["x", str(n)]} for n in range(6)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("stored")
    lines = [json.dumps(row) for row in ROWS]
    (base / "p.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, base / "p.parquet", row_group_size=2)
    datasets.Dataset.from_list(ROWS).save_to_disk(base / "one")
    (base / "files").mkdir()
    parquet.write_table(table, base / "files" / "train.parquet")
    return base


def rows(base: Path, *columns: str, **source: str) -> list:
    return list(stream_table(TableSource(**source), base, columns))


SOURCES = [
    {"file": "p.jsonl"},
    {"file": "p.parquet"},
    {"folder": "one"},
    {"dataset": "files", "split": "train"},
    {"dataset": "files"},
]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_kind_of_source_gives_the_same_rows(stored: Path, source: dict) -> None:
    read = rows(stored, "text", "list", **source)
    assert [row.values for row in read] == [
        {"text": row["text"], "list": row["list"]} for row in ROWS
    ]
    assert [row.number for row in read] == list(range(6))


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_slice_keeps_the_rows_numbers(stored: Path, source: dict) -> None:
    split = source.get("split", "") + "[2:4]"
    assert [row.number for row in rows(stored, "text", **source | {"split": split})] == [2, 3]


def test_a_row_of_a_text_file_knows_its_line(stored: Path) -> None:
    assert rows(stored, "text", file="p.jsonl")[1].place == f"{stored / 'p.jsonl'}, line 3"
    assert rows(stored, "text", file="p.parquet")[1].place.endswith("p.parquet, row 2")


def test_csv_cells_are_texts(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('n,text\n1,"one,\nand"\n2,two\n', encoding="utf-8")
    read = rows(tmp_path, "text", "n", file="p.csv")
    assert [row.values for row in read] == [{"text": "one,\nand", "n": "1"},
                                             {"text": "two", "n": "2"}]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ({"file": "p.jsonl"}, "no column 'txt'. Did you mean 'text'?"),
        ({"file": "p.parquet"}, "no column 'txt'. Did you mean 'text'?"),
        ({"dataset": "files"}, "no column 'txt'. Did you mean 'text'?"),
        ({"file": "missing.jsonl"}, "missing.jsonl is neither in"),
        ({"file": "one"}, "is not a file that ends in .jsonl, .csv, .parquet"),
        ({"builtin": "alarm"}, "Known: alarming, alice, general-knowledge"),
        ({"file": "p.jsonl", "split": "train"}, "a file has no split 'train'"),
    ],
)
def test_what_can_not_be_read_is_said(stored: Path, source: dict, part: str) -> None:
    with pytest.raises(PromptSourceError) as caught:
        rows(stored, "txt", **source)
    assert part in str(caught.value)


def test_a_slice_behind_the_end_is_an_error(stored: Path) -> None:
    with pytest.raises(PromptSourceError, match="selects nothing"):
        rows(stored, "text", file="p.jsonl", split="[6:]")


def test_rows_before_a_broken_line_are_handed_out(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "one"}\n{"text": \n', encoding="utf-8")
    stream = stream_table(TableSource(file="p.jsonl"), tmp_path, ["text"])
    assert next(stream).values == {"text": "one"}
    with pytest.raises(PromptSourceError, match="line 2: not JSON"):
        next(stream)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, ending: str) -> None:
    def peak(count: int) -> int:
        own = [{"text": f"{n} " + "x" * 1000} for n in range(count)]
        path = tmp_path / f"{count}.{ending}"
        if ending == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        else:
            parquet.write_table(pyarrow.Table.from_pylist(own), path, row_group_size=100)
        del own
        tracemalloc.start()
        for _ in stream_table(TableSource(file=path.name), tmp_path, ["text"]):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # imports
    assert peak(4000) < 1.2 * peak(1000) + 20_000


# The Hub


def test_a_stream_that_breaks_goes_on_behind_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    monkeypatch.setattr(hub.retry, "__defaults__", (5, 0.0, lambda _: None))
    opened = []

    def stream(seen: int):
        opened.append(seen)
        for number in range(seen, 7):
            if number in (3, 5) and len(opened) < 2 + (number == 5):
                raise ConnectionError("gone")
            yield number

    assert list(resume_on_error(stream)) == list(range(7))
    assert opened == [0, 3, 5]


def test_a_stream_that_can_not_be_mended_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(seen: int):
        yield seen
        raise ValueError("not a table")

    with pytest.raises(ValueError, match="not a table"):
        list(resume_on_error(stream))


def test_a_hub_data_set_is_streamed_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Info:
        sha = "0123abc"

    def load(name: str, config: str | None, **options: object):
        asked.append((name, config, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info())
    monkeypatch.setattr(datasets, "load_dataset", load)
    read = rows(Path(), "text", dataset="owner/name", config="all", split="test[:2]")
    assert [row.values["text"] for row in read] == ["word 0", "word 1"]
    assert read[1].place == "hub:owner/name, row 2"
    assert asked == [
        ("owner/name", "all", {"split": "test", "revision": "0123abc", "streaming": True})
    ]


def test_a_hub_data_set_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PromptSourceError, match="hub:owner/name"):
        rows(Path(), "text", dataset="owner/name")
