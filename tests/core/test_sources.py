"""Sources of text: what they yield, what they leave out, and the sentences with which they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepwright_core import data
from deepwright_core.data.document import Document, Dropped
from deepwright_core.data.manifest import collect, texts
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.registry import Registry

Read = Callable[..., list[Document | Dropped]]


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry()
    data.register(registry)
    return registry


@pytest.fixture
def read(registry: Registry) -> Read:
    return lambda **config: list(registry.build("source", config))


def documents(items: list[Document | Dropped]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def refusal(read: Read, **config: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read(**config)
    return str(caught.value)


@pytest.fixture(scope="module")
def stdlib(registry: Registry) -> list[Document | Dropped]:
    return list(registry.build("source", {"name": "stdlib", "max_bytes": 2_000_000}))


def test_stdlib_holds_topics_docstrings_and_source(stdlib: list[Document | Dropped]) -> None:
    sources = {document.source: document.text for document in documents(stdlib)}
    assert "with" in sources["topics/with"]
    assert "Return the sine of x" in sources["docstrings/math"]
    assert any(source.endswith(".py") and "import" in text for source, text in sources.items())


def test_stdlib_is_deterministic_bounded_and_split_by_file(
    stdlib: list[Document | Dropped], registry: Registry
) -> None:
    assert stdlib == list(registry.build("source", {"name": "stdlib", "max_bytes": 2_000_000}))
    size = sum(len(document.text.encode()) for document in documents(stdlib))
    assert 1_800_000 < size <= 2_000_000
    splits = {split: {d.source for d in documents(stdlib) if d.split == split} for split in ("train", "validation")}
    assert not splits["train"] & splits["validation"]
    assert len(splits["validation"]) >= 5


def test_a_larger_bound_moves_no_file_to_the_other_split(stdlib: list[Document | Dropped], registry: Registry) -> None:
    larger = {
        document.source: document.split
        for document in documents(list(registry.build("source", {"name": "stdlib", "max_bytes": 4_000_000})))
    }
    shared = [document for document in documents(stdlib) if document.source in larger]
    assert len(shared) > 100
    assert all(larger[document.source] == document.split for document in shared)


def test_stdlib_leaves_out_tests_tables_and_other_peoples_packages(stdlib: list[Document | Dropped]) -> None:
    for document in documents(stdlib):
        parts = document.source.split("/")
        assert not {"test", "tests", "idlelib", "site-packages"}.intersection(parts), document.source
        assert not document.source.startswith(("encodings/", "_sysconfigdata"))
    assert any(item.reason == "written by a program" for item in stdlib if isinstance(item, Dropped))


def test_jsonl_reads_a_glob_in_order(read: Read, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "zwei ü"}')
    items = documents(read(name="jsonl", path=str(tmp_path / "*.jsonl")))
    assert [item.text for item in items] == ["one", "zwei ü", "three", "four"]
    assert items[0].source == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut off', "not valid JSON"),
        (b"[1, 2]", "holds list; expected an object"),
        (b'{"body": "x"}', "no field 'text' (fields: body)"),
        (b'{"text": 7}', "is int; expected text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "line 2"),
    ],
)
def test_a_corrupt_jsonl_line_is_named_by_file_and_number(
    read: Read, tmp_path: Path, line: bytes, expected: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    message = refusal(read, name="jsonl", path=str(path))
    assert f"{path} line 2" in message
    assert expected in message


@pytest.mark.parametrize("name", ["jsonl", "text", "parquet"])
def test_an_empty_glob_is_refused(read: Read, tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow") if name == "parquet" else None
    pattern = str(tmp_path / "nothing-*")
    message = refusal(read, name=name, path=pattern)
    assert "data.path" in message and pattern in message and "matches no file" in message


def test_unknown_option_offers_the_near_one(read: Read) -> None:
    assert "max_bytes" in refusal(read, name="stdlib", max_byte=3)


def test_text_cuts_long_files_at_line_ends_and_loses_nothing(read: Read, tmp_path: Path) -> None:
    lines = [f"line {n} with some words, ä and 漢\n" for n in range(200)]
    (tmp_path / "long.txt").write_text("".join(lines), encoding="utf-8")
    items = documents(read(name="text", path=str(tmp_path), document_bytes=512))
    assert len(items) > 5
    assert "".join(item.text for item in items) == "".join(lines)
    assert all(item.text.endswith("\n") and len(item.text) <= 512 for item in items)


def test_text_that_is_not_utf8_is_refused(read: Read, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    assert "is not UTF-8" in refusal(read, name="text", path=str(tmp_path))


def test_validation_path_fixes_the_splits_and_survives_the_bound(read: Read, tmp_path: Path) -> None:
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(50)))
    config = {"path": str(tmp_path / "train.jsonl"), "validation_path": str(tmp_path / "held.jsonl")}
    items = read(name="jsonl", max_bytes=600, **config)
    assert {item.text.split()[0]: item.split for item in documents(items)} == {"held": "validation", "train": "train"}
    assert sum(len(item.text) for item in documents(items)) <= 600
    assert isinstance(items[-1], Dropped) and "max_bytes" in items[-1].reason


def test_parquet_reads_a_column(read: Read, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    items = read(name="parquet", path=str(path), field="body")
    assert [item.text for item in documents(items)] == ["one", "two"]
    assert Dropped(str(path), "empty") in items
    assert "no column 'text' (columns: body, n)" in refusal(read, name="parquet", path=str(path))
    assert "is int; expected text" in refusal(read, name="parquet", path=str(path), field="n")
    path.write_bytes(b"not parquet")
    assert "is not a Parquet file" in refusal(read, name="parquet", path=str(path))


def test_a_missing_library_says_what_to_install(read: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "deepwright-core[parquet]" in refusal(read, name="parquet", path=str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "deepwright-core[hub]" in refusal(read, name="hub", dataset="some/thing")


class FakeHub:
    """Stands in for the datasets library: rows by split, or an error to raise."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]], error: Exception | None = None) -> None:
        self.rows, self.error, self.calls = rows, error, []

    def load_dataset(self, *names: str | None, **options: Any) -> list[dict[str, Any]]:
        self.calls.append((names, options))
        if self.error:
            raise self.error
        return self.rows[options["split"]]


def test_hub_reads_splits_through_the_library(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub({"train": [{"t": "a"}, {"t": "b"}], "dev": [{"t": "c"}]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    items = documents(read(name="hub", dataset="me/set", subset="en", field="t", validation_split="dev"))
    assert [(item.text, item.split) for item in items] == [("c", "validation"), ("a", "train"), ("b", "train")]
    assert hub.calls[0] == (("me/set", "en"), {"split": "dev", "revision": None, "streaming": True})
    assert "no column 'text' (columns: t)" in refusal(read, name="hub", dataset="me/set")
    hub.error = ValueError("Unknown split")
    assert "Unknown split" in refusal(read, name="hub", dataset="me/set")
    hub.error = ConnectionError("no route")
    with pytest.raises(WorkError, match="no route"):
        read(name="hub", dataset="me/set")


def test_duplicates_are_dropped_once_and_recorded(tmp_path: Path) -> None:
    items = [
        Document("the same  text\n", "a.txt", "train"),
        Document("the same text", "b.txt", "validation"),
        Document("another", "b.txt", "validation"),
        Dropped("c.txt", "empty"),
    ]
    manifest = collect(items, tmp_path)
    assert list(texts(tmp_path, "train")) == ["the same  text\n"]
    assert list(texts(tmp_path, "validation")) == ["another"]
    record = manifest.as_json()
    assert record["dropped"] == {
        "duplicate": {"count": 1, "names": ["b.txt"]},
        "empty": {"count": 1, "names": ["c.txt"]},
    }
    assert record["splits"]["train"]["bytes"] == 15
    assert [file["source"] for file in record["files"]] == ["a.txt", "b.txt"]


def test_digests_tell_apart_documents_that_join_to_the_same_text(tmp_path: Path) -> None:
    def digest(*parts: str) -> str:
        items = [Document(part, "f", "train") for part in parts]
        return collect(items, tmp_path / "-".join(parts)).as_json()["splits"]["train"]["sha256"]

    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", "c") == digest("ab", "c")
