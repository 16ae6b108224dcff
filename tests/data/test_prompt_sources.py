"""Prompts from every kind of source, and what the error says when there are none."""

import json
import logging
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import errors as hub_errors
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from ray_abliterate.data.hub import retry
from ray_abliterate.data.prompt_sources import load_prompt_set, warn_on_overlap
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe import PromptSource
from tests.support.http_errors import http_error

WORDS = [f"prompt {number}" for number in range(6)]
SHA = "0123456789abcdef0123456789abcdef01234567"


def users(source: dict, base: Path) -> list[str]:
    return [p.user for p in load_prompt_set("behaviour", PromptSource(**source), base).prompts]


def message(source: dict, base: Path) -> str:
    with pytest.raises(PromptSourceError) as caught:
        load_prompt_set("behaviour", PromptSource(**source), base)
    return str(caught.value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """The same six prompts in every form."""
    base = tmp_path_factory.mktemp("stored")
    table = datasets.Dataset.from_dict({"text": WORDS, "label": list(range(6))})
    (base / "p.txt").write_text("\n".join(WORDS), encoding="utf-8")
    lines = [json.dumps({"label": n, "text": word}) for n, word in enumerate(WORDS)]
    (base / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (base / "p.csv").write_text("label,text\n" + "".join(f"1,{w}\n" for w in WORDS), "utf-8")
    rows = pyarrow.table({"text": WORDS, "label": range(6)})
    parquet.write_table(rows, base / "p.parquet", row_group_size=2)
    table.save_to_disk(base / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(base / "splits")
    (base / "files").mkdir()
    parquet.write_table(rows, base / "files" / "train.parquet")
    return base


SOURCES = [
    {"file": "p.txt"},
    {"file": "p.jsonl", "column": "text"},
    {"file": "p.csv", "column": "text"},
    {"file": "p.parquet", "column": "text"},
    {"folder": "one", "column": "text"},
    {"folder": "splits", "column": "text", "split": "train"},
    {"dataset": "files", "column": "text", "split": "train"},
    {"dataset": "files", "column": "text"},
    {"dataset": "one", "column": "text"},
    {"dataset": "splits", "column": "text", "split": "train"},
]
TABLES = [source for source in SOURCES if "column" in source]


def sliced(source: dict, bounds: str) -> dict:
    return source | {"split": source.get("split", "") + bounds}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_kind_of_source_gives_the_same_prompts_in_order(stored, source):
    assert users(source, stored) == WORDS


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 5), (3, None), (5, 6)])
def test_a_slice_selects_what_python_would(stored, source, start, stop):
    bounds = f"[{start or ''}:{stop or ''}]"
    assert users(sliced(source, bounds), stored) == WORDS[start:stop]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_slice_beyond_the_end_takes_what_there_is_and_says_both_numbers(stored, source, caplog):
    assert users(sliced(source, "[4:400]"), stored) == WORDS[4:]
    assert "the slice ends at 400" in caplog.text
    assert "has 6" in caplog.text


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_slice_that_begins_beyond_the_end_is_refused(stored, source):
    text = message(sliced(source, "[9:12]"), stored)
    assert "behaviour" in text
    assert "[9:12]" in text
    assert "6 rows" in text


@pytest.mark.parametrize("source", TABLES, ids=str)
def test_a_wrong_column_is_refused_with_the_columns_there_are(stored, source):
    text = message(source | {"column": "texte"}, stored)
    assert "no column 'texte'" in text
    assert "Did you mean 'text'?" in text
    assert "label" in text


@pytest.mark.parametrize("source", TABLES, ids=str)
def test_a_column_of_numbers_gives_no_prompts(stored, source):
    if source.get("file") == "p.csv":
        return  # Everything in a CSV file is text.
    text = message(source | {"column": "label"}, stored)
    assert "int" in text
    assert "`column`" in text


# Text files


def write(base: Path, name: str, data: bytes) -> dict:
    (base / name).write_bytes(data)
    return {"file": name}


def test_blank_lines_are_neither_prompts_nor_counted_by_slices(tmp_path):
    source = write(tmp_path, "p.txt", b"\n  \none\n\n\ttwo \n\nthree\n")
    assert users(source, tmp_path) == ["one", "two", "three"]
    assert users(source | {"split": "[1:2]"}, tmp_path) == ["two"]


def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_prompts(tmp_path):
    source = write(tmp_path, "p.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert users(source, tmp_path) == ["one", "two"]
    table = write(tmp_path, "p.csv", b"\xef\xbb\xbftext,n\r\none,1\r\ntwo,2\r\n")
    assert users(table | {"column": "text"}, tmp_path) == ["one", "two"]
    rows = write(tmp_path, "p.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert users(rows | {"column": "text"}, tmp_path) == ["one", "two"]


def test_only_line_feeds_end_a_prompt(tmp_path):
    source = write(tmp_path, "p.txt", "one\u2028still one\x0cand on\ntwo\n".encode())
    assert users(source, tmp_path) == ["one\u2028still one\x0cand on", "two"]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_text_in_another_encoding_is_refused_and_never_guessed(tmp_path, name):
    source = write(tmp_path, name, 'text\n{"text": "Käse"}\n'.encode("latin-1"))
    column = {} if name == "p.txt" else {"column": "text"}
    assert "utf-8" in message(source | column, tmp_path).lower().replace("utf8", "utf-8")


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n"])
def test_a_file_without_a_prompt_is_refused(tmp_path, data):
    assert "p.txt" in message(write(tmp_path, "p.txt", data), tmp_path)


def test_a_missing_file_is_refused_with_the_places_that_were_searched(tmp_path):
    text = message({"file": "nope.txt"}, tmp_path)
    assert "nope.txt" in text
    assert str(tmp_path) in text
    assert str(Path.cwd()) in text


def test_the_recipes_folder_comes_before_the_working_folder(tmp_path, monkeypatch):
    here, base = tmp_path / "here", tmp_path / "base"
    here.mkdir()
    base.mkdir()
    (here / "p.txt").write_text("working folder")
    monkeypatch.chdir(here)
    assert users({"file": "p.txt"}, base) == ["working folder"]
    (base / "p.txt").write_text("recipe's folder")
    assert users({"file": "p.txt"}, base) == ["recipe's folder"]
    assert users({"file": str(here / "p.txt")}, base) == ["working folder"]


@pytest.mark.parametrize("name", ["p.json", "p", "p.txt.gz"])
def test_an_unknown_kind_of_file_is_refused_with_the_kinds_there_are(tmp_path, name):
    source = write(tmp_path, name, b"x") | {"column": "text"}
    assert ".jsonl" in message(source, tmp_path)


def test_a_split_of_a_file_is_refused(tmp_path):
    source = write(tmp_path, "p.txt", b"one\n")
    assert "[:400]" in message(source | {"split": "train[:1]"}, tmp_path)


# Tables


def test_a_cell_may_hold_line_ends_commas_and_quotes(tmp_path):
    cells = ["one,\ntwo", 'say "three"', " four "]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    source = write(tmp_path, "p.csv", ("text\n" + "\n".join(quoted) + "\n").encode())
    assert users(source | {"column": "text"}, tmp_path) == cells


def test_a_cell_with_line_ends_may_cross_the_blocks_that_a_file_is_parsed_in(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_abliterate.data.readers.CSV_BLOCK_BYTES", 50)
    cells = [f"first {n}\nsecond\nthird" for n in range(20)]
    source = write(tmp_path, "p.csv", ("text\n" + "".join(f'"{c}"\n' for c in cells)).encode())
    assert users(source | {"column": "text"}, tmp_path) == cells


def test_numbers_and_dates_in_a_csv_file_stay_the_text_they_are(tmp_path):
    source = write(tmp_path, "p.csv", b"text,n\n007,1\n2024-01-01,2\nNULL,3\n")
    assert users(source | {"column": "text"}, tmp_path) == ["007", "2024-01-01", "NULL"]


def test_cells_that_are_not_text_are_skipped_and_counted(tmp_path, caplog):
    rows = ["one", None, "", "  ", 5, ["two"], "\ud800", "three"]
    data = "\n".join(json.dumps({"text": row}) for row in rows) + '\n{"other": 1}\n'
    source = write(tmp_path, "p.jsonl", data.encode()) | {"column": "text"}
    assert users(source, tmp_path) == ["one", "three"]
    assert "7 of 9 rows" in caplog.text


def test_null_cells_of_a_parquet_file_are_skipped(tmp_path, caplog):
    parquet.write_table(pyarrow.table({"text": ["one", None, " "]}), tmp_path / "p.parquet")
    assert users({"file": "p.parquet", "column": "text"}, tmp_path) == ["one"]
    assert "2 of 3 rows" in caplog.text


def test_a_column_of_blanks_is_refused(tmp_path):
    source = write(tmp_path, "p.csv", b'text,n\n"",1\n" ",2\n') | {"column": "text"}
    assert "all 2 rows" in message(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.jsonl", b'{"text": "one"}\n{"text": '),
        ("p.jsonl", b'{"text": "one"}\n["two"]\n'),
        ("p.csv", b"text,n\none,1\ntwo,2,3\n"),
        ("p.csv", b""),
        ("p.parquet", b"PAR1 but no more"),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path, name, data):
    assert name in message(write(tmp_path, name, data) | {"column": "text"}, tmp_path)


def test_rows_behind_the_slice_are_not_read(tmp_path):
    source = write(tmp_path, "p.jsonl", b'{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    assert users(source | {"column": "text", "split": "[:2]"}, tmp_path) == ["one", "two"]


# Saved data sets, and folders of data files


def test_a_saved_data_set_with_splits_asks_for_one_of_them(stored):
    source = {"folder": "splits", "column": "text"}
    assert "train, test" in message(source, stored)
    assert "train, test" in message(source | {"split": "validation[:3]"}, stored)


def test_a_split_of_a_saved_data_set_without_splits_is_refused(stored):
    text = message({"folder": "one", "column": "text", "split": "train[:2]"}, stored)
    assert "no split 'train'" in text


def test_a_folder_that_datasets_did_not_save_is_refused(stored):
    assert "`dataset`" in message({"folder": "files", "column": "text"}, stored)


def test_an_unknown_split_of_a_folder_of_files_names_the_splits(stored):
    source = {"dataset": "files", "column": "text", "split": "test"}
    assert "train" in message(source, stored)


def test_a_folder_of_files_is_streamed(stored, monkeypatch):
    asked = []
    real = datasets.load_dataset

    def spy(*args, **options):
        asked.append(options["streaming"])
        return real(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    assert len(users({"dataset": "files", "column": "text"}, stored)) == 6
    assert asked == [True]


# What is put around the prompts


def test_prefix_suffix_and_system_prompt_are_applied_to_every_prompt(tmp_path):
    source = write(tmp_path, "p.txt", b"one\ntwo\n")
    settings = PromptSource(**source, prefix="Say: ", suffix="!", system="Be brief.")
    loaded = load_prompt_set("neutral", settings, tmp_path)
    assert loaded.name == "neutral"
    assert loaded.prompts == (
        Prompt("Say: one!", "Be brief."),
        Prompt("Say: two!", "Be brief."),
    )


def test_the_first_of_repeated_prompts_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = "\n".join(json.dumps({"text": t}) for t in ["one", "two", " one ", "Two", " one"])
    source = write(tmp_path, "p.jsonl", rows.encode()) | {"column": "text"}
    assert users(source, tmp_path) == ["one", "two", "Two"]
    assert "2 repeated" in caplog.text
    assert len(users(source | {"deduplicate": False}, tmp_path)) == 5


@given(st.lists(st.sampled_from(["a", "b", "c", " a", "d "]), min_size=1))
def test_deduplication_keeps_the_order_and_loses_no_text(tmp_path_factory, texts):
    base = tmp_path_factory.mktemp("dedup")
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    source = write(base, "p.jsonl", rows.encode()) | {"column": "text"}
    stripped = [user.strip() for user in users(source, base)]
    assert stripped == list(dict.fromkeys(text.strip() for text in texts))


def test_the_origin_says_where_the_prompts_came_from(stored):
    source = PromptSource(file="p.csv", column="text", split="[:3]")
    origin = load_prompt_set("a", source, stored).origin
    assert origin == f"file:{stored / 'p.csv'} [:3] text"


def test_a_builtin_set_is_read_and_an_unknown_one_names_those_there_are():
    source = {"builtin": "cooking-train", "split": "[:3]"}
    assert len(users(source, Path())) == 3
    assert load_prompt_set("a", PromptSource(**source), Path()).origin == (
        "builtin:cooking-train [:3]"
    )
    assert "cooking-train" in message({"builtin": "cooking"}, Path())


# The Hub, replaced at the network's edge


class Hub:
    """A Hub with one data set of endless rows; counts what is pulled from it."""

    def __init__(self, monkeypatch):
        self.pulled = 0
        self.loads: list[tuple] = []
        self.lookups: list[tuple] = []
        self.info_errors: list[Exception] = []
        self.load_errors: list[Exception] = []
        self.row_errors: list[Exception] = []
        hub = self

        def rows():
            for number in range(10**9):
                hub.pulled += 1
                if number == 2 and hub.row_errors:
                    raise hub.row_errors.pop()
                yield {"text": f"prompt {number}", "label": number}

        def load_dataset(path, name=None, **options):
            hub.loads.append((path, name, options))
            if hub.load_errors:
                raise hub.load_errors.pop()
            return datasets.IterableDataset.from_generator(rows)

        def dataset_info(api, repo_id, *, revision=None, timeout=None, **_):
            hub.lookups.append((repo_id, revision))
            if hub.info_errors:
                raise hub.info_errors.pop()
            return huggingface_hub.hf_api.DatasetInfo(id=repo_id, sha=SHA)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        self.delays: list[float] = []
        waiting = partial(retry, sleep=self.delays.append)
        for module in ("prompt_sources", "readers"):
            monkeypatch.setattr(f"ray_abliterate.data.{module}.retry", waiting)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    return Hub(monkeypatch)


HUB_SOURCE = {"dataset": "owner/name", "column": "text", "split": "train[10:15]"}


def test_a_hub_data_set_is_streamed_no_further_than_the_slice(hub, tmp_path):
    assert users(HUB_SOURCE, tmp_path) == [f"prompt {n}" for n in range(10, 15)]
    assert hub.pulled == 15
    assert [options["streaming"] for _, _, options in hub.loads] == [True]


def test_a_hub_data_set_is_read_at_the_commit_that_its_origin_records(hub, tmp_path):
    source = PromptSource(**HUB_SOURCE, revision="main", config="small")
    loaded = load_prompt_set("a", source, tmp_path)
    assert loaded.origin == f"hub:owner/name@{SHA} config=small train[10:15] text"
    assert hub.lookups == [("owner/name", "main")]
    ((path, config, options),) = hub.loads
    assert (path, config, options["revision"]) == ("owner/name", "small", SHA)
    assert options["split"] == "train"


def test_a_wrong_column_of_a_hub_data_set_costs_one_row(hub, tmp_path):
    text = message(HUB_SOURCE | {"column": "txt"}, tmp_path)
    assert "Did you mean 'text'?" in text
    assert hub.pulled == 1


def test_a_stream_that_breaks_is_read_again_from_its_start(hub, tmp_path, caplog):
    hub.row_errors = [http_error(hub_errors.HfHubHTTPError, 503, "busy"), TimeoutError("slow")]
    assert users(HUB_SOURCE, tmp_path) == [f"prompt {n}" for n in range(10, 15)]
    assert len(hub.delays) == 2
    assert "attempt 2 of 5" in caplog.text


def test_a_hub_that_stays_away_is_given_up_after_five_attempts(hub, tmp_path):
    hub.info_errors = [ConnectionError("unreachable") for _ in range(9)]
    text = message(HUB_SOURCE, tmp_path)
    assert "cannot be reached" in text
    assert len(hub.lookups) == 5
    assert not hub.loads


NOT_FOUND = hub_errors.RepositoryNotFoundError
PERMANENT = [
    (http_error(NOT_FOUND, 404), "Check the name"),
    (http_error(hub_errors.GatedRepoError, 403), "accept its terms"),
    (http_error(hub_errors.RevisionNotFoundError, 404), "`revision`"),
    (http_error(hub_errors.HfHubHTTPError, 401), "hf auth login"),
    (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
    (hub_errors.HFValidationError("a/b/c is no name"), "Check the name"),
]


@pytest.mark.parametrize(("error", "advice"), PERMANENT, ids=lambda v: type(v).__name__)
def test_what_another_attempt_cannot_mend_is_raised_at_once(hub, tmp_path, error, advice):
    hub.info_errors = [error]
    text = message(HUB_SOURCE, tmp_path)
    assert advice in text
    assert "owner/name" in text
    assert len(hub.lookups) == 1
    assert not hub.delays


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ValueError("Bad split: trian. Available splits: ['train']"), "Available splits"),
        (ValueError("BuilderConfig 'x' not found. Available: ['default']"), "`config`"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts"),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'owner/name' is a gated dataset on the Hub."
            ),
            "accept its terms",
        ),
    ],
    ids=lambda v: str(v)[:20],
)
def test_what_datasets_refuses_is_passed_on_with_advice(hub, tmp_path, error, advice):
    hub.load_errors = [error]
    assert advice in message(HUB_SOURCE, tmp_path)
    assert not hub.delays


def test_no_secret_gets_into_a_message_or_the_log(hub, tmp_path, caplog):
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    url = "https://user:swordfish@proxy/x?X-Amz-Signature=cafe"
    leaky = f"403 for {url} with Bearer {secret}, {secret}"
    hub.info_errors = [
        http_error(hub_errors.HfHubHTTPError, 403, leaky),
        http_error(hub_errors.HfHubHTTPError, 500, leaky),
    ]
    shown = message(HUB_SOURCE, tmp_path) + caplog.text
    assert "403 for https://" in shown
    for word in (secret, "swordfish", "cafe"):
        assert word not in shown


# Overlap


def test_prompts_that_are_both_extracted_from_and_scored_are_reported(caplog):
    behaviour = PromptSet.of("behaviour", "one", "two", "three")
    neutral = PromptSet.of("neutral", "four")
    scored = PromptSet.of("keyword-rate", "One ", "five", "six", "seven")
    (sentence,) = warn_on_overlap([behaviour, neutral], [scored])
    assert "1 of 4 prompts of 'keyword-rate' (25%)" in sentence
    assert "'behaviour'" in sentence
    assert sentence in caplog.text


def test_sets_that_share_nothing_give_no_warning(caplog):
    assert warn_on_overlap([PromptSet.of("a", "one")], [PromptSet.of("b", "two")]) == []
    assert not caplog.records
