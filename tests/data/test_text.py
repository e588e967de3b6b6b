"""Text as sequences of characters or words; LEAF's text sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpers.data import DatasetConfig
from fedpers.data.datasets import load_dataset
from fedpers.data.sequences import pad
from fedpers.data.sets.base import Dataset
from fedpers.data.sets.text import windows
from fedpers.errors import DataError

TEXTS = {"Ann": "abcabcab", "Bob": "ba", "Cid": "c"}


def written(folder: Path, texts: dict[str, Any] = TEXTS) -> Path:
    path = folder / "said.json"
    path.write_text(json.dumps(texts))
    return path


def load(root: Path, name: str = "text", **options: Any) -> Dataset:
    return load_dataset(DatasetConfig(name, root=str(root), **options))


def test_characters_are_numbered_and_cut(tmp_path: Path) -> None:
    data = load(written(tmp_path), sequence_length=3)
    assert data.x.tolist() == [[1, 2, 3], [1, 2, 3], [1, 0, 0], [2, 0, 0]]
    assert data.y.tolist() == [[2, 3, 1], [2, 3, 1], [2, -1, -1], [1, -1, -1]]
    assert data.owner is not None
    assert data.owner.tolist() == [0, 0, 0, 1]
    assert data.owner_names == ("Ann", "Bob")  # Cid says nothing after the first character
    assert (data.num_tokens, data.num_classes, data.task.name) == (4, 4, "next_token")


def test_a_folder_of_files_is_as_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "said"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    one, other = load(written(tmp_path), sequence_length=3), load(folder, sequence_length=3)
    assert torch.equal(one.x, other.x)
    assert one.owner_names == other.owner_names


def test_rare_words_are_unknown(tmp_path: Path) -> None:
    root = written(tmp_path, {"Ann": "the cat The dog the cat"})
    data = load(root, level="word", sequence_length=5, vocabulary_size=2)
    assert data.x.tolist() == [[2, 1, 2, 0, 2]]  # cat, the
    assert data.num_tokens == 3


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.integers(1, 12))
def test_each_token_but_the_first_is_predicted_once(ids: list[int], length: int) -> None:
    x, y = windows(np.array(ids, dtype=np.int64), length)
    assert y[y >= 0].tolist() == ids[1:]
    assert x[y >= 0].tolist() == ids[:-1]
    assert bool((x[y < 0] == 0).all())
    assert bool((y >= 0).any(1).all())


def test_short_texts_are_padded_in_front() -> None:
    assert pad([[1, 2], [1, 2, 3, 4], []], 3, left=True).tolist() == [[0, 1, 2], [2, 3, 4], [0, 0, 0]]
    assert pad([[1, 2], [1, 2, 3, 4], []], 3, -1).tolist() == [[1, 2, -1], [2, 3, 4], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Ann": "ab', "said.json is damaged or no UTF-8 text"),
        ('{"Ann": 3}', r"must hold the text of each client: \{client: text\}"),
        ("{}", "must hold the text of each client"),
        ('{"Ann": "a"}', "no client has two characters of text"),
        (b'{"Ann": "\xe4\xe4\xe4"}', "no UTF-8 text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    root = tmp_path / "said.json"
    root.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(root)
    with pytest.raises(DataError, match=r"has no \.txt file"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"^dataset\.root=.*absent\.json is missing\.$"):
        load(tmp_path / "absent.json")


# ---------------------------------------------------------------------- LEAF


def as_leaf(path: Path, samples: dict[str, tuple[list[Any], list[Any]]]) -> Path:
    path.write_text(
        json.dumps(
            {
                "users": list(samples),
                "num_samples": [len(x) for x, _ in samples.values()],
                "user_data": {user: {"x": x, "y": y} for user, (x, y) in samples.items()},
            }
        )
    )
    return path


def test_shakespeare_of_leaf(tmp_path: Path) -> None:
    root = as_leaf(tmp_path / "all.json", {"ROMEO": (["abca", "bcab"], ["b", "c"]), "JULIET": (["caba"], [" "])})
    data = load(root, "leaf")
    assert data.x.tolist() == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 0]]
    assert data.class_names == (" ", "b", "c")
    assert data.y.tolist() == [1, 2, 0]
    assert (data.num_tokens, data.num_classes, data.task.name) == (3, 3, "classification")
    assert data.owner_names == ("JULIET", "ROMEO")


def test_tweets_of_leaf(tmp_path: Path) -> None:
    def tweet(text: str) -> list[str]:
        return ["1467", "Mon Apr 06", "NO_QUERY", "ann", text, "training"]

    root = as_leaf(tmp_path / "all.json", {"ann": ([tweet("So so good"), tweet("bad")], [1, 0])})
    data = load(root, "leaf", sequence_length=2)
    assert data.x.tolist() == [[3, 2], [0, 1]]  # bad, good, so
    assert data.y.tolist() == [1, 0]
    assert data.num_tokens == 4


def test_comments_of_leaf(tmp_path: Path) -> None:
    x = [[["<BOS>", "hi", "you"], ["there", "<EOS>", "<PAD>"]]]
    y = [{"target_tokens": [["hi", "you", "there"], ["<EOS>", "<PAD>", "<PAD>"]], "author": "ann"}]
    data = load(as_leaf(tmp_path / "all.json", {"ann": (x, y)}), "leaf")
    assert data.x.tolist() == [[1, 3, 5], [4, 2, 0]]  # <BOS>, <EOS>, hi, there, you
    assert data.y.tolist() == [[3, 5, 4], [2, -1, -1]]
    assert (data.num_tokens, data.num_classes, data.task.name) == (6, 6, "next_token")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((["abc", "ab"], ["b", "c"]), "a sample of user u is not 3 characters of text with one character as label"),
        ((["abc"], ["bc"]), "a sample of user u is not 3 characters"),
        (([["a", "b"]], [1]), "a sample of user u is no list with the text at position 4"),
        (([[["a"]]], [{"author": "u"}]), "is no list of lists of words with 'target_tokens'"),
        (([[["a"]]], [{"target_tokens": [["a", "b"]]}]), "inputs and target_tokens of user u differ in length"),
        (([[1.0], [1.0, 2.0]], [0, 1]), "inputs are no lists of numbers of one length"),
        (([[1.0], [2.0]], [[0], [1, 2]]), "labels are no numbers or text, one for each sample"),
    ],
)
def test_text_of_leaf_that_is_of_another_form(tmp_path: Path, samples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(as_leaf(tmp_path / "all.json", {"u": samples}), "leaf")


def test_tokens_in_an_npz_file(tmp_path: Path) -> None:
    root = tmp_path / "tokens.npz"
    x = np.array([[0, 1, 2], [2, 2, 4]])
    np.savez(root, x=x, y=np.array([[1, 2, -1], [2, 4, 5]]), label=np.array(["sad", "glad"]))
    data = load(root, "npz", tokens=True)
    assert (data.task.name, data.num_tokens, data.num_classes) == ("next_token", 6, 6)
    data = load(root, "npz", y="label", tokens=True)
    assert (data.task.name, data.num_tokens, data.num_classes) == ("classification", 5, 2)
    assert data.class_names == ("glad", "sad")
    np.savez(root, x=-x, y=np.array([1, 2]))
    with pytest.raises(DataError, match="tokens in x run from -4"):
        load(root, "npz", tokens=True)
    with pytest.raises(DataError, match="x is int64, expected uint8 pictures or floats; whole numbers that are tokens"):
        load(root, "npz")
    np.savez(root, x=x.astype(float), y=np.array([1, 2]))
    with pytest.raises(DataError, match=r"x is float64 \[2, 3\], expected tokens, whole numbers"):
        load(root, "npz", tokens=True)


def test_articles_are_their_last_words(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('"3","Oil up","Oil, oil and gold"\n"1","Talks","so far"\n')
    (tmp_path / "test.csv").write_text('"4","New chip","gold far"\n')
    data = load(tmp_path, "ag_news", sequence_length=4)
    # the comma, and, far, gold, oil, so, talks, up
    assert data.x.tolist() == [[1, 5, 2, 4], [0, 7, 6, 3], [0, 0, 4, 3]]
    assert (data.y.tolist(), data.class_names[3], data.train_size) == ([2, 0, 3], "Sci/Tech", 2)
    assert data.num_tokens == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [('"5","a","b"', "line 1 is no article"), ('"1","a"', "line 1 is no article"), ("", "holds no articles")],
)
def test_what_is_no_article_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(line)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "ag_news")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match="AG News is not downloaded"):
        load(tmp_path, "ag_news")
