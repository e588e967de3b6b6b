"""How samples are divided among clients: the group ``partition``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedpers.errors import check
from fedpers.settings.base import Choices, Needed, OnlyFor, Settings

DEFAULT_CLIENTS = 10
CLIENTS_OF_DATA = ("natural", "grouped_natural", "domains", "index", "user")
"""Partitions for which the number of clients comes with the data."""
_DRAWN = ("iid", "dirichlet", "inner_dirichlet", "pathological", "shards", "power_law", "quantity", "continuous")
_NUM_CLIENTS = dict.fromkeys(_DRAWN, DEFAULT_CLIENTS) | {
    "disjoint_classes": 5,  # as published for ten classes
    "label_sets": 20,
    "pfllib_dirichlet": 20,  # as PFLlib has it
    "pfllib_pathological": 20,
}


@dataclass
class PartitionConfig(Settings, group="partition"):
    """How samples are divided among clients (the group ``partition``)."""

    name: Annotated[
        str,
        Choices(
            iid="samples dealt at random, equally many to each client",
            dirichlet="each class is divided by proportions drawn from Dirichlet(alpha); arXiv 1905.12022",
            inner_dirichlet="sizes are given, and the mix of a client's classes drawn from Dirichlet(alpha); arXiv "
            "2111.04263",
            pathological="each client has a few classes only, shared with others; arXiv 2102.02079",
            disjoint_classes="all samples of a class belong to one client, each has equally many classes; arXiv "
            "2308.15367 (pFedPG: 5 clients on CIFAR-10, 10 on CIFAR-100)",
            shards="samples sorted by class are cut into shards, a client is dealt a few; arXiv 1602.05629 (FedAvg); "
            "with num_clients=100 split=official on CIFAR-10 the setting of FedSelect",
            power_law="each client has a few neighbouring classes, sizes are log-normal; arXiv 1812.06127 (FedProx)",
            quantity="labels mixed as in the whole, sizes differ",
            continuous="for a regression: samples sorted by the number to predict, with noise, are cut into equal "
            "parts; from flwr-datasets",
            natural="client ids that come with the data (dataset.client)",
            domains="each client has samples of one domain that comes with the data (the style of a picture); arXiv "
            "2102.07623 (FedBN), 2308.15367 (pFedPG)",
            grouped_natural="several owners of the data, drawn at random, form a client; from flwr-datasets",
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
            description="clients; of natural so many owners drawn at random, of index the first, of domains dealt to "
            "them in turn; null: all, or one for each domain",
        ),
        OnlyFor("natural", "grouped_natural", "domains", "index", **_NUM_CLIENTS),
    ] = None
    seed: Annotated[int | None, Field(ge=0, description="of the division and the split; null: the seed of the run")] = (
        None
    )
    min_samples: Annotated[
        int,
        Field(ge=1, description="samples every client has at least: a quarter of 40, for testing, are 10"),
        OnlyFor(*_DRAWN, "disjoint_classes", "natural", "grouped_natural", "domains", "index"),
    ] = 40
    alpha: Annotated[
        float,
        Field(gt=0, description="concentration; small is heterogeneous, large is like iid"),
        OnlyFor("dirichlet", "inner_dirichlet", "domains", "pfllib_dirichlet"),
    ] = 0.1
    classes_per_client: Annotated[int, Field(ge=1), OnlyFor("pathological", "power_law", "pfllib_pathological")] = 2
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
    shards_per_client: Annotated[
        int,
        Field(ge=1, description="so many pieces of samples of one class, or of neighbouring ones"),
        OnlyFor("shards"),
    ] = 2
    sizes: Annotated[
        Literal["equal", "linear", "square", "exponential"],
        Field(description="equal, or beyond min_samples a share in proportion to k, k**2 or exp(k) for client k"),
        OnlyFor("inner_dirichlet"),
    ] = "equal"
    sigma: Annotated[
        float,
        Field(ge=0, le=10, description="deviation of the logarithm of sizes; 0: equal ones"),
        OnlyFor("power_law"),
    ] = 2.0
    strictness: Annotated[
        float, Field(ge=0, le=1, description="weight of the number beside noise; 0: as iid, 1: by the number alone"),
        OnlyFor("continuous"),
    ] = 0.5  # fmt: skip
    target: Annotated[
        int, Field(ge=0, description="by which of several numbers to predict, from 0"), OnlyFor("continuous")
    ] = 0
    within: Annotated[
        Literal["iid", "dirichlet"],
        Field(description="how clients divide their domain: at random, or each class by Dirichlet(alpha)"),
        OnlyFor("domains"),
    ] = "iid"
    owners_per_client: Annotated[
        int, Field(ge=1, description="some clients have more where the owners cannot be grouped evenly"),
        OnlyFor("grouped_natural"),
    ] = 2  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_clients is None and self.name not in CLIENTS_OF_DATA:
            self.num_clients = _NUM_CLIENTS[self.name]
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
