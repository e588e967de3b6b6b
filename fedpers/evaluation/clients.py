"""What clients own: sizes, labels and how far these are from those of all, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpers.data.federated import PARTS, FederatedData
from fedpers.errors import FedpersError

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_CLIENTS, MAX_CLASSES = 200, 100
"""So many are drawn at most, the first."""


def describe_clients(data: FederatedData) -> DataFrame:
    """One row per client.

    Returns
    -------
    DataFrame
        ``client``, ``name`` if the data name clients, ``group`` if they fall into groups, with a drift
        ``group_after_drift`` (counts are those before it), ``train``, ``validation``,
        ``test`` (samples; of ratings the items that the user rated), ``unseen``; with class labels also ``divergence``,
        the total variation distance between the labels of the client and of all (0: the same mix, 1: no class in
        common), and a column for each class with the client's samples of it.
    """
    import pandas as pd

    columns: dict[str, Any] = {"client": range(data.num_clients)}
    if data.client_names:
        columns["name"] = data.client_names
    if data.groups:
        columns["group"] = data.groups
    if data.drifted_groups:
        columns["group_after_drift"] = data.drifted_groups
    counts = {part: data.label_counts(part) for part in PARTS}  # which leaves out what a held-out item is ranked among
    columns |= {part: counted.sum(1).tolist() for part, counted in counts.items()}
    columns["unseen"] = [client in data.unseen for client in range(data.num_clients)]
    if data.task.classes:
        owned = np.sum([counted.numpy() for counted in counts.values()], axis=0)
        shares = owned / np.maximum(owned.sum(1, keepdims=True), 1)
        columns["divergence"] = np.abs(shares - owned.sum(0) / owned.sum()).sum(1) / 2
        names = data.class_names or tuple(map(str, range(data.num_classes)))
        columns |= {f"class {name}": owned[:, label] for label, name in enumerate(names)}
    return pd.DataFrame(columns)


def draw_clients(rows: DataFrame, title: str, path: Path) -> None:
    """Draw a bubble for each client and class, its area in proportion to the client's samples of the class.

    Parameters
    ----------
    rows : DataFrame
        Of :func:`describe_clients`, with classes.
    title : str
    path : Path
        ``.svg``, ``.png`` or ``.pdf``.

    Raises
    ------
    FedpersError
        If there are no classes, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    classes = [column for column in rows.columns if column.startswith("class ")][:MAX_CLASSES]
    if not classes:
        raise FedpersError(f"{path}: there are no classes to draw.")
    counts = rows[classes].to_numpy()[:MAX_CLIENTS]
    clients, labels = counts.shape
    figure = Figure(figsize=(min(13.0, 3.5 + 0.3 * clients), min(12.0, 1.8 + 0.3 * labels)), layout="constrained")
    axes = figure.subplots()
    x, y = np.meshgrid(np.arange(clients), np.arange(labels), indexing="ij")
    present = counts > 0
    # the largest bubble touches its neighbours: 72 points are an inch, and a client has about 0.3 of one
    points = 72 * min(0.3, 9.0 / clients, 10.0 / labels)
    area = (points**2) * counts / counts.max()
    bubbles: dict[str, Any] = {"color": "#2a6fbb", "alpha": 0.8, "linewidth": 0}
    axes.scatter(x[present], y[present], s=area[present], **bubbles)
    most = int(counts.max())
    for number in sorted({most, -(-most // 4), -(-most // 16)}, reverse=True):
        axes.scatter([], [], s=points**2 * number / most, label=f"{number:,}", **bubbles)
    figure.legend(loc="outside right upper", title="samples", frameon=False, labelspacing=points / 12, borderpad=1.0)
    axes.set_xlim(-0.7, clients - 0.3)
    axes.set_ylim(-0.7, labels - 0.3)
    names = [str(name) for name in (rows["name"] if "name" in rows else rows["client"])][:clients]
    step = -(-clients // 40)
    turned = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(range(0, clients, step), names[::step], rotation=turned)
    axes.set_yticks(range(labels), [name.removeprefix("class ") for name in classes])
    axes.set_xlabel("client")
    axes.set_ylabel("class")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FedpersError(f"{path} cannot be written ({error}); pictures are .svg, .png or .pdf.") from error
