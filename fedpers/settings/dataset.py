"""Which data: the group ``dataset``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import CUSTOM, Needed, OnlyFor, OpenChoices, Settings
from fedpers.settings.sources import SOURCES

PICTURES = ("mnist", "fashion_mnist", "kmnist", "emnist", "usps", "svhn", "cifar10", "cifar100")
"""Data sets that torchvision knows."""
RATINGS = ("amazon_video", "lastfm2k", "movielens100k", "movielens1m", "ratings", "synthetic_ratings")
"""Data sets of users and items."""
OWN_FILES = ("npz", "npy", "domains", "csv", "parquet", "images", "pfllib", "leaf", "text")
"""Data of one's own in files."""
LEAVE_ONE_OUT = 3
"""Interactions a user needs: one each to train, validate and test on."""
_FILES = tuple(name for name in RATINGS if name != "synthetic_ratings")
_TABLES = ("csv", "parquet", "hf")
_SCALED = ("images", "domains", "hf")
_VOCABULARY = 10_000
_SEQUENCE_LENGTH = {"text": 80, "leaf": 25, "ag_news": 64}
_MIN_INTERACTIONS = {name: 5 if name == "amazon_video" else 10 for name in RATINGS}  # as published


@dataclass
class DatasetConfig(Settings, group="dataset"):
    """Which data to load (the group ``dataset``)."""

    name: Annotated[
        str,
        OpenChoices(
            digits="1,797 pictures of 8x8 pixels, 10 classes; comes with scikit-learn, nothing to download",
            mnist="70,000 pictures of 28x28 pixels, 10 classes; root holds MNIST/raw or its four idx files",
            fashion_mnist="70,000 pictures of 28x28 pixels, 10 classes; root holds FashionMNIST/raw or its idx files",
            kmnist="70,000 pictures of 28x28 pixels, 10 classes of Japanese letters; root holds KMNIST/raw or its idx "
            "files",
            emnist="handwritten letters and digits of 28x28 pixels, 10 to 62 classes (dataset.variant); root holds "
            "EMNIST/raw or its idx files",
            usps="9,298 pictures of 16x16 pixels, 10 classes; root holds usps.bz2 and usps.t.bz2",
            svhn="99,289 colour pictures of 32x32 pixels, house numbers, 10 classes; root holds train_32x32.mat and "
            "test_32x32.mat",
            cifar10="60,000 colour pictures of 32x32 pixels, 10 classes; root holds cifar-10-batches-py",
            cifar100="60,000 colour pictures of 32x32 pixels, 100 classes; root holds cifar-100-python",
            har="10,299 windows of 9 signals of smartphones, 6 activities, by 30 people; root holds UCI HAR Dataset",
            npz="arrays of your own in the .npz file root",
            npy="arrays larger than memory: root is a folder of x.npy, y.npy and perhaps client.npy and domain.npy",
            domains="pictures in several styles: each .npz file of the folder root, with uint8 x and y, is a domain",
            csv="a table of your own: root is a .csv file whose columns are features, label and perhaps client",
            parquet="a table of your own: root is a .parquet file whose columns are features, label and perhaps client",
            images="pictures of your own: root holds a folder for each class, perhaps within folders of domains",
            hf="a set of Hugging Face's library datasets: path is its name, or the folder it was saved to",
            pfllib="the folder root as PFLlib writes it: train/0.npz, test/0.npz, ..., config.json",
            leaf="LEAF's .json files: root is a file, a folder of them, or one with train and test",
            text="text of each client, whose next character or word is learned: root is a folder of .txt files, or a "
            ".json file {client: text}",
            ag_news="120,000 and 7,600 news articles of 4 kinds; root holds train.csv and test.csv",
            synthetic_ratings="made up: groups of users see items in their own way; nothing to download",
            movielens100k="100,000 ratings of 1,682 films by 943 users; root holds u.data or ratings.dat, from "
            "grouplens.org/datasets/movielens/100k",
            movielens1m="1,000,209 ratings of 3,706 films by 6,040 users; root holds ratings.dat, from "
            "grouplens.org/datasets/movielens/1m",
            amazon_video="63,836 ratings of 11,830 videos by 8,072 users; root holds ratings.dat or "
            "ratings_Amazon_Instant_Video.csv",
            lastfm2k="92,780 pairs of 1,874 users and 17,612 artists; root holds user_artists.dat, from "
            "grouplens.org/datasets/hetrec-2011",
            ratings="ratings of your own: root is a .csv file with the columns user, item and perhaps rating and "
            "time, or an .npz file with such arrays",
        ),
    ] = "digits"
    root: Annotated[
        str | None,
        Field(description="folder of the files, or the file; null: $FEDPERS_CACHE/data or ~/.cache/fedpers/data"),
        OnlyFor(*OWN_FILES, *PICTURES, *_FILES, "har", "ag_news"),
        Needed(*OWN_FILES, "ratings", "har"),
    ] = None
    path: Annotated[
        str | None, Field(description="name of the set, such as ylecun/mnist, or the folder it was saved to"),
        OnlyFor("hf"), Needed("hf"),
    ] = None  # fmt: skip
    variant: Annotated[
        Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"],
        Field(
            description="byclass: 62 classes; bymerge: 47, letters that look alike in both cases being one; balanced: "
            "equally many of each of these 47; letters: 26; digits: 10; mnist: 10, as many as MNIST has"
        ),
        OnlyFor("emnist"),
    ] = "balanced"
    size: Annotated[int, Field(ge=1, description="pixels a side to which pictures are scaled"), OnlyFor(*_SCALED)] = 32
    label: Annotated[str, Field(description="column of classes, or of numbers to predict"), OnlyFor(*_TABLES)] = "label"
    features: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, title="one or more names of columns, or null",
              description="columns of inputs, which get mean 0 and deviation 1; null: all others that have a name"),
        OnlyFor(*_TABLES),
    ] = None  # fmt: skip
    task: Annotated[
        Literal["classification", "regression"] | None,
        Field(description="what the label stands for; null: whole numbers and text are classes, other numbers are "
                          "predicted as such"),
        OnlyFor(*_TABLES),
    ] = None  # fmt: skip
    download: Annotated[bool, Field(description="fetch what is not there"), OnlyFor(*PICTURES)] = True
    x: Annotated[
        str,
        Field(
            description="array of inputs: uint8 pictures [N, H, W] or [N, H, W, C]; floats taken as they are; or "
            "tokens, whole numbers [N, T]"
        ),
        OnlyFor("npz", "domains"),
    ] = "x"
    y: Annotated[
        str,
        Field(
            description="array of class ids [N]; of floats [N] or [N, D], the targets of a regression; or of the next "
            "tokens [N, T]"
        ),
        OnlyFor("npz", "domains"),
    ] = "y"
    client: Annotated[
        str | None,
        Field(description="array or column of client ids, for partition=natural"),
        OnlyFor("npz", *_TABLES),
    ] = None
    tokens: Annotated[
        bool,
        Field(description="whether inputs are tokens; y then holds classes or the next tokens"),
        OnlyFor("npz", "npy"),
    ] = False
    domain: Annotated[
        str | None,
        Field(description="array or column that names the domain of each sample, numbers or text"),
        OnlyFor("npz", *_TABLES),
    ] = None
    n_train: Annotated[
        str | None,
        Field(description="array with one number: so many samples, the first, are the official training part"),
        OnlyFor("npz"),
    ] = None
    level: Annotated[Literal["character", "word"], Field(description="what a text is cut into"), OnlyFor("text")] = (
        "character"
    )
    sequence_length: Annotated[
        int | None, Field(ge=1, description="tokens of a sequence; of LEAF's tweets the last words"),
        OnlyFor(**_SEQUENCE_LENGTH),
    ] = None  # fmt: skip
    vocabulary_size: Annotated[
        int,
        Field(
            ge=1,
            description="words that are told apart, the most frequent; to predict that another comes is never right",
        ),
        OnlyFor("text", "leaf", "ag_news"),
    ] = _VOCABULARY
    protocol: Annotated[
        Literal["clean", "symmetric", "official"],
        Field(
            description="symmetric: training negatives spare all items a user is evaluated on, clean: none of them; "
            "official, as the methods' authors: only the held-out ones, both are ranked among the same negatives, and "
            "the best round is chosen as they do"
        ),
        OnlyFor(*RATINGS),
    ] = "clean"
    min_interactions: Annotated[
        int | None,
        Field(ge=LEAVE_ONE_OUT, description="users with fewer are left out"),
        OnlyFor(**_MIN_INTERACTIONS),
    ] = None
    negatives: Annotated[
        int, Field(ge=1, description="items drawn for each training item in each round"), OnlyFor(*RATINGS)
    ] = 4
    eval_negatives: Annotated[
        int, Field(ge=1, description="items the user never touched among which a held-out one is ranked"),
        OnlyFor(*RATINGS),
    ] = 99  # fmt: skip
    held_out: Annotated[
        Literal["latest", "last_row", "random", "newest_item"] | None,
        Field(
            description="which items of a user are for testing and validation: the latest; those of the last rows of "
            "the file; drawn at random; newest_item, of files without times: those that appear last in the file for "
            "the first time, as in the codes of FedRAP and PFedRec. null: latest, but of files without times random "
            "(protocol=official: newest_item)"
        ),
        OnlyFor(*RATINGS),
    ] = None
    top_k: Annotated[int, Field(ge=1, description="length of the recommended list"), OnlyFor(*RATINGS)] = 10
    max_users: Annotated[
        int | None, Field(ge=1, description="the first so many users, for quick runs; null: all"), OnlyFor(*RATINGS)
    ] = None
    arguments: Annotated[
        dict[str, Any] | None, Field(description="what a function of your own is called with"), OnlyFor(CUSTOM)
    ] = None
    num_users: Annotated[int, Field(ge=1), OnlyFor("synthetic_ratings")] = 200
    num_items: Annotated[int, Field(ge=40), OnlyFor("synthetic_ratings")] = 300
    seed: Annotated[
        int, Field(ge=0, description="of what users like; not changed by the run's seed"), OnlyFor("synthetic_ratings")
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {
            "npz": "an .npz file", "ratings": "a .csv or .npz file", "csv": "a .csv file", "parquet": "a .parquet file",
            "images": "a folder of pictures", "pfllib": "a folder of PFLlib", "leaf": "a file or folder of LEAF",
            "text": "a folder of .txt files or a .json file",
            "npy": "a folder of .npy files", "domains": "a folder of .npz files",
            "har": f"the folder UCI HAR Dataset, from {SOURCES['har'].url} ({SOURCES['har'].licence})",
        }  # fmt: skip
        allowed = "no value, except for a function of your own, dataset=module:function"
        check(not self.arguments or ":" in self.name, "dataset.arguments", self.arguments, allowed)
        check(self.name != "hf" or bool(self.path), "dataset.path", self.path, "the name or the folder of a set")
        needed = self.name not in kinds or bool(self.root)
        check(needed, "dataset.root", self.root, f"the path of {kinds.get(self.name)}")
        allowed = f"names of columns without the label '{self.label}', each once"
        listed = list(self.features or ())
        usable = self.label not in listed and len(set(listed)) == len(listed)
        check(usable, "dataset.features", listed, allowed)
        if self.min_interactions is None:
            self.min_interactions = _MIN_INTERACTIONS.get(self.name, 10)
        words = self.level == "word" or self.name != "text" or self.vocabulary_size == _VOCABULARY
        allowed = f"{_VOCABULARY}, its default, because characters are all told apart (dataset.level=word)"
        check(words, "dataset.vocabulary_size", self.vocabulary_size, allowed)
        if self.sequence_length is None:
            self.sequence_length = _SEQUENCE_LENGTH.get(self.name, 80)

    @property
    def holds_ratings(self) -> bool:
        """Whether the data are ratings of users, whom nothing has to divide."""
        return self.name in RATINGS
