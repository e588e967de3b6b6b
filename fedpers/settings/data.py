"""Which data, who owns them, and how each client's are split: the groups ``dataset``, ``partition`` and ``split``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import CUSTOM, Choices, Needed, OnlyFor, OpenChoices, Settings

DEFAULT_CLIENTS = 20
LEAVE_ONE_OUT = 3
"""Interactions a user needs: one each to train, validate and test on."""
PICTURES = ("mnist", "fashion_mnist", "cifar10", "cifar100")
"""Data sets that torchvision knows."""
RATINGS = ("amazon_video", "lastfm2k", "movielens100k", "movielens1m", "ratings", "synthetic_ratings")
"""Data sets of users and items."""
CLIENTS_OF_DATA = ("natural", "index", "user")
"""Partitions for which the number of clients comes with the data."""
_FILES = tuple(name for name in RATINGS if name != "synthetic_ratings")
_TABLES = ("csv", "parquet", "hf")
_SCALED = ("images", "hf")
OWN_FILES = ("npz", "csv", "parquet", "images", "pfllib", "leaf")
"""Data of one's own in files."""
_DRAWN = ("iid", "dirichlet", "pathological", "quantity")
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
            cifar10="60,000 colour pictures of 32x32 pixels, 10 classes; root holds cifar-10-batches-py",
            cifar100="60,000 colour pictures of 32x32 pixels, 100 classes; root holds cifar-100-python",
            npz="arrays of your own in the .npz file root",
            csv="a table of your own: root is a .csv file whose columns are features, label and perhaps client",
            parquet="a table of your own: root is a .parquet file whose columns are features, label and perhaps client",
            images="pictures of your own: root holds a folder for each class, perhaps within folders of domains",
            hf="a set of Hugging Face's library datasets: path is its name, or the folder it was saved to",
            pfllib="the folder root as PFLlib writes it: train/0.npz, test/0.npz, ..., config.json",
            leaf="LEAF's .json files: root is a file, a folder of them, or one with train and test",
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
        OnlyFor(*OWN_FILES, *PICTURES, *_FILES),
        Needed(*OWN_FILES, "ratings"),
    ] = None
    path: Annotated[
        str | None, Field(description="name of the set, such as ylecun/mnist, or the folder it was saved to"),
        OnlyFor("hf"), Needed("hf"),
    ] = None  # fmt: skip
    size: Annotated[int, Field(ge=1, description="pixels a side to which pictures are scaled"), OnlyFor(*_SCALED)] = 32
    label: Annotated[str, Field(description="column of classes, or of numbers to predict"), OnlyFor(*_TABLES)] = "label"
    features: Annotated[
        tuple[str, ...] | None,
        Field(min_length=1, title="one or more names of columns, or null",
              description="columns of inputs, which get mean 0 and deviation 1; null: all but label and client that "
                          "have a name"),
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
        Field(description="array of inputs: uint8 pictures [N, H, W] or [N, H, W, C], or floats taken as they are"),
        OnlyFor("npz"),
    ] = "x"
    y: Annotated[
        str,
        Field(description="array of class ids [N], or of floats [N] or [N, D], the targets of a regression"),
        OnlyFor("npz"),
    ] = "y"
    client: Annotated[
        str | None,
        Field(description="array or column of client ids, for partition=natural"),
        OnlyFor("npz", *_TABLES),
    ] = None
    n_train: Annotated[
        str | None,
        Field(description="array with one number: so many samples, the first, are the official training part"),
        OnlyFor("npz"),
    ] = None
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

    @property
    def holds_ratings(self) -> bool:
        """Whether the data are ratings of users, whom nothing has to divide."""
        return self.name in RATINGS


@dataclass
class PartitionConfig(Settings, group="partition"):
    """How samples are divided among clients (the group ``partition``)."""

    name: Annotated[
        str,
        Choices(
            iid="samples dealt at random, equally many to each client",
            dirichlet="each class is divided by proportions drawn from Dirichlet(alpha)",
            pathological="each client has a few classes only",
            quantity="labels mixed as in the whole, sizes differ",
            natural="client ids that come with the data (dataset.client)",
            pfllib_dirichlet="PFLlib's division by Dirichlet(alpha), with its train and test parts; its own seed is 1",
            pfllib_pathological="PFLlib's division into a few classes for each client, with its train and test parts",
            index="lists of samples in a file",
            label_sets="clients hold sets of labels and may share training samples; the setting of FedJETs",
            user="each user of a set of ratings is a client; dataset.max_users limits them",
        ),
    ] = "iid"
    num_clients: Annotated[
        int | None,
        Field(
            ge=1,
            description="clients; of natural so many owners drawn at random, of index the first; null: all of these "
            f"two, {DEFAULT_CLIENTS} of others",
        ),
        OnlyFor(
            "natural",
            "index",
            iid=DEFAULT_CLIENTS,
            dirichlet=DEFAULT_CLIENTS,
            pathological=DEFAULT_CLIENTS,
            quantity=DEFAULT_CLIENTS,
            label_sets=DEFAULT_CLIENTS,
            pfllib_dirichlet=DEFAULT_CLIENTS,
            pfllib_pathological=DEFAULT_CLIENTS,
        ),
    ] = None
    seed: Annotated[int | None, Field(ge=0, description="of the division and the split; null: the seed of the run")] = (
        None
    )
    min_samples: Annotated[
        int, Field(ge=1, description="samples every client has at least"), OnlyFor(*_DRAWN, "natural", "index")
    ] = 10
    alpha: Annotated[
        float,
        Field(gt=0, description="concentration; small is heterogeneous, large is like iid"),
        OnlyFor("dirichlet", "pfllib_dirichlet"),
    ] = 0.1
    classes_per_client: Annotated[int, Field(ge=1), OnlyFor("pathological", "pfllib_pathological")] = 2
    skew: Annotated[
        Literal["linear", "square", "exponential"],
        Field(description="beyond min_samples, client k gets a share in proportion to k, k**2 or exp(k)"),
        OnlyFor("quantity"),
    ] = "linear"
    file: Annotated[
        str | None,
        Field(description="a .json or .npz file: one list per client, or such lists for train, validation and test"),
        OnlyFor("index"),
        Needed("index"),
    ] = None
    anchors: Annotated[
        int, Field(ge=0, description="the first so many clients divide all labels among themselves"),
        OnlyFor("label_sets"),
    ] = 5  # fmt: skip
    labels_per_client: Annotated[
        int, Field(ge=1, description="of a client that is no anchor, drawn at random"), OnlyFor("label_sets")
    ] = 4
    samples_per_client: Annotated[
        int, Field(ge=1, description="for training, spread evenly over the labels"), OnlyFor("label_sets")
    ] = 100
    unseen_label_sets: Annotated[
        int,
        Field(ge=0, description="further clients, which never train, with sets of labels no other client has"),
        OnlyFor("label_sets"),
    ] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_clients is None and self.name not in CLIENTS_OF_DATA:
            self.num_clients = DEFAULT_CLIENTS
        check(self.name != "index" or bool(self.file), "partition.file", self.file, "the path of a .json or .npz file")
        if self.name == "label_sets" and self.num_clients is not None:
            allowed = f"at most partition.num_clients={self.num_clients}"
            check(self.anchors <= self.num_clients, "partition.anchors", self.anchors, allowed)
            enough = self.samples_per_client >= self.labels_per_client
            allowed = f"at least partition.labels_per_client={self.labels_per_client}"
            check(enough, "partition.samples_per_client", self.samples_per_client, allowed)
        if self.name == "user":
            allowed = "null with partition=user; dataset.max_users limits the users"
            check(self.num_clients is None, "partition.num_clients", self.num_clients, allowed)


@dataclass
class SplitConfig(Settings, group="split"):
    """How a client's samples are split (the group ``split``)."""

    name: Annotated[
        str,
        Choices(
            fractions="each client's own samples, at random",
            official="clients own training samples; the official test samples are dealt by each client's label mix",
            leave_one_out="ratings only: a user's latest item is for testing, the one before for validation",
        ),
    ] = "fractions"
    validation: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the client's samples, or of its training samples (official); 0: no round is selected "
            "and the last one is reported",
        ),
        OnlyFor("fractions", "official"),
    ] = 0.15
    test: Annotated[
        float, Field(gt=0, lt=1, description="share of the client's samples; the rest is for training"),
        OnlyFor("fractions"),
    ] = 0.25  # fmt: skip
    public: Annotated[
        float,
        Field(ge=0, lt=1, description="share of all training samples that belongs to nobody, for pretraining"),
        OnlyFor("fractions", "official"),
    ] = 0.0
    unseen: Annotated[
        int, Field(ge=0, description="so many clients, drawn at random, never train and are only evaluated")
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "fractions":
            allowed = f"less than 1 - split.validation = {1 - self.validation:g}"
            check(self.validation + self.test < 1, "split.test", self.test, allowed)
