"""Reading ratings, and what a user reads when a file is not what it should be."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedpers.data import DatasetConfig, PartitionConfig, load_dataset
from fedpers.data.sets.rating_files import FILES, Ratings, read_ratings
from fedpers.errors import ConfigError, DataError
from fedpers.settings.dataset import RATINGS

ROWS = [(3, 7, 5, 100), (3, 9, 1, 101), (4, 7, 2, 99)]


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows(separator: str) -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in ROWS)


def plain(ratings: Ratings) -> list[tuple[Any, ...]]:
    time = [None] * len(ratings) if ratings.time is None else ratings.time.tolist()
    return list(zip(ratings.user.tolist(), ratings.item.tolist(), ratings.rating.tolist(), time, strict=True))


def read(name: str, root: object) -> Ratings:
    return read_ratings(DatasetConfig(name, str(root)))


# --- what can be read ---


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("movielens100k", "u.data", rows("\t")),
        ("movielens100k", "ml-100k/u.data", rows("\t")),
        ("movielens100k", "ratings.dat", rows(",")),
        ("movielens1m", "ratings.dat", rows("::")),
        ("movielens1m", "ml-1m/ratings.dat", rows("::").rstrip("\n")),
        ("amazon_video", "ratings.dat", rows(",")),
    ],
)
def test_public_formats(tmp_path: Path, name: str, file: str, text: str) -> None:
    path = written(tmp_path / file, text)
    for root in (tmp_path, path):
        ratings = read(name, root)
        values = plain(ratings)
        assert values == ROWS
        assert ratings.name == name
        assert ratings.user.dtype == ratings.item.dtype == np.int64
        assert ratings.rating.dtype == np.float64


@pytest.mark.parametrize(
    ("items", "codes"),
    [
        (["0123", "123", "0123"], [0, 1, 0]),  # a leading zero
        (["7", "B00X", "7"], [0, 1, 0]),  # mixed kinds
        (["NA", "None", "nan"], [0, 1, 2]),
        (["é", " é", "e"], [0, 0, 1]),
        (["12345678901234567890", "12345678901234567891", "1"], [0, 1, 2]),  # more digits than int64 has
        (["3", "1", "3"], [3, 1, 3]),
        (["3.0", "1", "3"], [3, 1, 3]),
    ],
)
def test_ids_are_text_unless_plainly_numbers(tmp_path: Path, items: list[str], codes: list[int]) -> None:
    file = written(tmp_path / "a.csv", "user,item\n" + "".join(f"{item},{item}\n" for item in items))
    ratings = read("ratings", file)
    assert ratings.item.tolist() == ratings.user.tolist() == codes
    names = [ratings.user_names[code] if ratings.user_names else str(code) for code in codes]
    assert names == [item.strip().removesuffix(".0") for item in items]


def test_amazon_ids_are_names(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", "A1,0000143502,5.0,1\nA2,B00X,4.0,2\nA1,143502,5.0,1\n")
    assert plain(read("amazon_video", file)) == [(0, 0, 5.0, 1), (1, 1, 4.0, 2), (0, 2, 5.0, 1)]


def test_lastfm_listens_and_tags(tmp_path: Path) -> None:
    written(tmp_path / "user_artists.dat", "userID\tartistID\tweight\n2\t51\t13883\n2\t52\t11690\n")
    assert plain(read("lastfm2k", tmp_path)) == [(2, 51, 13883.0, None), (2, 52, 11690.0, None)]
    tags = written(tmp_path / "tags.dat", "userID\tartistID\ttagID\ttimestamp\n2\t51\t13\t1238536800000\n")
    assert plain(read("lastfm2k", tags)) == [(2, 51, 1.0, 1238536800000)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user,item\n1,2\n", [(1, 2, 1.0, None)]),
        ("time;item;user\n5;2;1\n", [(1, 2, 1.0, 5)]),
        ('"userId","movieId","rating","timestamp"\r\n1,2,3.5,4\r\n', [(1, 2, 3.5, 4)]),
        ("\ufeffuser_id\titem_id\tnote\n1\t2\tgood\n", [(1, 2, 1.0, None)]),
        ("user,item,rating,time\nann,cup,1,0.5\nbob,cup,1,0\n", [(0, 0, 1.0, 0.5), (1, 0, 1.0, 0.0)]),
        ("user,item\n\n1.0,2\n\n", [(1, 2, 1.0, None)]),
        ("user,,note,item,,note\n1,,a,2,,b\n", [(1, 2, 1.0, None)]),
    ],
)
def test_own_csv(tmp_path: Path, text: str, expected: list[tuple[Any, ...]]) -> None:
    ratings = read("ratings", written(tmp_path / "mine.csv", text))
    assert plain(ratings) == expected
    assert ratings.name == "mine"


def test_npz(tmp_path: Path) -> None:
    user, item, rating, time = np.array(ROWS).T
    np.savez(tmp_path / "ml100k.npz", user=user.astype(np.int16), item=item, rating=rating.astype(np.uint8), time=time)
    for name, root in (("movielens100k", tmp_path), ("ratings", tmp_path / "ml100k.npz")):
        assert plain(read(name, root)) == ROWS
    np.savez(tmp_path / "named.npz", user=np.array(["b", "a", "b"]), item=item)
    assert plain(read("ratings", tmp_path / "named.npz")) == [(1, 7, 1.0, None), (0, 9, 1.0, None), (1, 7, 1.0, None)]


def test_packed_npz(tmp_path: Path) -> None:
    # User 1 has items 5 6 7, user 2 has none, user 3 has 5 8; 6 and 5 are the latest, of the rest nothing is known.
    count, item = np.array([3, 1, 2], np.int16), np.array([5, 6, 7, 9, 5, 8], np.int16)
    np.savez(tmp_path / "ml1m.npz", count=count, item=item, test_item=np.array([6, 9, 5]))
    ratings = read("movielens1m", tmp_path)
    assert plain(ratings) == [(1, 5, 1, 0), (1, 6, 1, 1), (1, 7, 1, 0), (2, 9, 1, 1), (3, 5, 1, 1), (3, 8, 1, 0)]
    np.savez(tmp_path / "lastfm2k.npz", ua=np.array([[2, 51, 13], [4, 51, 9]]))
    assert plain(read("lastfm2k", tmp_path)) == [(2, 51, 13.0, None), (4, 51, 9.0, None)]


# --- what cannot ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.csv is empty, expected rows of user, item, rating and time\."),
        ("\n\n", r"is empty"),
        ("user,item\n", r"is empty"),
        ("usr,item\n1,2\n", r"a\.csv has no column 'user'; its first line names usr, item\."),
        ("user;thing\n1;2\n", r"has no column 'item'; its first line names user, thing\."),
        ("user,item,userId\n1,2,3\n", r"has more than one column 'user'"),
        ("user,item,rating\n1,2,3\n1,2,x\n", r"column 'rating' has 'x' in row 2, expected a number\."),
        ("user,item\n1,2\n3,\n", r"column 'item' has no value in row 2\."),
        ("user,item\n1,-2\n", r"column 'item' has -2 in row 1, expected a whole number >= 0\."),
        ("user,item\n1,2.5\n", r"column 'item' has 2\.5 in row 1, expected a whole number >= 0\."),
        ("user,item\n1e30,2\n", r"column 'user' has 1e30 in row 1, expected a whole number >= 0\."),
        ("user,item,time\n1,2,inf\n", r"column 'time' has inf in row 1, expected a number\."),
        ("user,item\n1,2,3\n4,5,6\n", r"is damaged \(its rows have more cells than its first line\)\."),
        ("user,item\n1,2\n4,5,6\n", r"is damaged \(.*Expected 2 fields in line 3, saw 3\)\."),
        ('user,item\n1,"2\n', r"is damaged \(.*EOF inside string"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read("ratings", written(tmp_path / "a.csv", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t2\n", r"u\.data has 2 columns, expected user, item, rating and perhaps time\."),
        ("1\t2\t3\t4\t5\n", r"has 5 columns, expected"),
        ("1\t2\t3\t4\n1\t2\t3\n", r"column 'time' has no value in row 2\."),
        ("1::2::3::4\n1::2::bad::4\n", r"column 'rating' has 'bad' in row 2, expected a number\."),
    ],
)
def test_bad_text_without_header(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("movielens100k", written(tmp_path / "u.data", text))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"user": [1]}, r"has no array 'item'; it has user\."),
        ({"user": [1], "item": [1, 2]}, r"columns differ in length: user 1, item 2\."),
        ({"user": [[1]], "item": [1]}, r"user is int64 \[1, 1\], expected numbers \[n\]\."),
        ({"user": [1], "item": [2], "rating": ["x"]}, r"rating is <U1 \[1\], expected numbers \[n\]\."),
        ({"user": [1], "item": [2], "time": [np.nan]}, r"column 'time' has nan in row 1, expected a number\."),
        ({"user": [-1], "item": [2]}, r"column 'user' has -1 in row 1"),
        ({"user": np.zeros(0, int), "item": np.zeros(0, int)}, r"is empty"),
        ({"ua": [[1, 2]]}, r"ua is \[1, 2\], expected \[n, 3\]: user, artist, listenings\."),
        ({"count": [1], "item": [1]}, r"has no array 'test_item', which belongs to 'count'\."),
        (
            {"count": [2], "item": [1], "test_item": [1]},
            r"count has 2 rows of 1 users, but item and test_item do not\.",
        ),
        ({"count": [1, 1], "item": [1, 2], "test_item": [1, 1]}, r"test_item of user 2 is not among its items\."),
        ({"count": [0.5], "item": [1], "test_item": [1]}, r"count must be whole numbers \[n\]\."),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read("ratings", tmp_path / "a.npz")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"movielens1m: .* has none of ratings\.dat, .*; fetch them from https://group"):
        read("movielens1m", tmp_path)
    with pytest.raises(DataError, match=r"^dataset\.root=.*nothing\.csv is missing or not a file\.$"):
        read("ratings", tmp_path / "nothing.csv")
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path))
    written(tmp_path / "data" / "u.data", rows("\t"))
    assert len(read_ratings(DatasetConfig("movielens100k"))) == 3
    written(tmp_path / "data" / "ratings.dat", rows("::"))  # of which set nobody knows
    for name in ("movielens1m", "amazon_video"):
        with pytest.raises(DataError, match=f"{name}: .* has none of"):
            read_ratings(DatasetConfig(name))
    assert len(read("movielens1m", tmp_path / "data")) == 3


@pytest.mark.parametrize("kind", ["latin-1", "utf-16", "gz", "xz", "dates", "parquet", "camel"])
def test_files_as_people_have_them(tmp_path: Path, kind: str) -> None:
    users, items, days = ["Zoë", "Zoë", "Ann"], ["a", "b", "a"], ["2024-03-01", "2024-02-01", "2024-01-31 12:00"]
    rows = pd.DataFrame({"user": users, "item": items, "rating": [5.0, 4.0, 3.0], "time": days})
    path = tmp_path / f"a.{'parquet' if kind == 'parquet' else 'csv'}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind in ("gz", "xz"):
        path = tmp_path / f"a.csv.{kind}"
        rows.to_csv(path, index=False)
    elif kind in ("latin-1", "utf-16"):
        rows.to_csv(path, index=False, encoding=kind)
    else:
        rows.to_csv(path, index=False, header=["userId", "movieId", "rating", "timestamp"])
    ratings = read("ratings", path)
    assert ratings.user_names == ("Zoë", "Ann")
    assert ratings.item.tolist() == [0, 1, 0]
    assert ratings.time is not None
    assert np.argsort(ratings.time).tolist() == [2, 1, 0]


def test_parquet_has_times_as_times(tmp_path: Path) -> None:
    table = pd.DataFrame({"user": ["a", "a"], "item": ["x", "y"], "rating": [1.0, 2.0]})
    table["time"] = pd.to_datetime(["2024-03-01", "2024-02-01"], utc=True)
    table.to_parquet(tmp_path / "a.parquet")
    ratings = read("ratings", tmp_path / "a.parquet")
    assert ratings.time is not None
    assert np.argsort(ratings.time).tolist() == [1, 0]
    table.assign(weight=1.0).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has 2 columns 'rating'"):
        read("ratings", tmp_path / "b.parquet")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"user\0item")
    with pytest.raises(DataError, match=r"a\.csv is not a text file"):
        read("ratings", tmp_path / "a.csv")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **values: Any) -> bytes:
        raise PermissionError(13, "Permission denied", "a.csv")

    file = written(tmp_path / "a.csv", "user,item\n1,2\n")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"ratings: \[Errno 13\] Permission denied: 'a\.csv'\."):
        read("ratings", file)


# --- settings ---


def test_names() -> None:
    assert set(FILES) == set(RATINGS) - {"ratings", "synthetic_ratings"}


def test_published_minimum() -> None:
    assert DatasetConfig("movielens100k").min_interactions == 10
    assert DatasetConfig("amazon_video").min_interactions == 5
    assert DatasetConfig("amazon_video", min_interactions=7).min_interactions == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "ratings"}, r"dataset\.root=None: expected the path of a \.csv or \.npz file"),
        ({"name": "movielens"}, r"dataset=movielens: .*did you mean 'movielens1"),
        (
            {"protocol": "offical"},
            r"dataset\.protocol=offical: expected one of clean, official, symmetric \(did you mean 'official'",
        ),
        ({"min_interactions": 2}, r"dataset\.min_interactions=2: expected a whole number >= 3, or null\."),
        ({"negatives": 0}, r"dataset\.negatives=0: expected a whole number >= 1\."),
        ({"eval_negatives": 0}, r"dataset\.eval_negatives=0: "),
        ({"top_k": True}, r"dataset\.top_k=True: "),
        ({"max_users": 0}, r"dataset\.max_users=0: expected a whole number >= 1, or null\."),
        ({"num_items": 39}, r"dataset\.num_items=39: expected a whole number >= 40\."),
        ({"num_users": None}, r"dataset\.num_users=None: expected a whole number\."),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(**{"name": "synthetic_ratings"} | values)


def test_ratings_have_no_labelled_samples() -> None:
    with pytest.raises(
        ConfigError, match=r"dataset=synthetic_ratings: expected a set of samples with labels; for ratings"
    ):
        load_dataset(DatasetConfig("synthetic_ratings"))


def test_users_are_counted_by_the_data_set() -> None:
    with pytest.raises(
        ConfigError, match=r"partition\.num_clients=5: expected null with partition=user; dataset\.max_us"
    ):
        PartitionConfig("user", 5)


@pytest.mark.parametrize("day", ["02/01/2020", "01.02.2020", "yesterday"])
def test_dates_whose_order_would_be_a_guess_are_refused(tmp_path: Path, day: str) -> None:
    file = written(tmp_path / "a.csv", f"user,item,time\n1,2,{day}\n1,3,{day}\n")
    with pytest.raises(DataError, match=f"column 'time' has '{day}' in row 1, expected a number"):
        read("ratings", file)
