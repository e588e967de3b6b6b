"""Methods against Local and FedAvg: which test carries a claim, and what the sentence says."""

from __future__ import annotations

import math

import pyarrow
import pytest
from pyarrow import parquet

from fedpers.evaluation.leaderboard import leaderboard, leaderboard_rows
from fedpers.evaluation.runs import find_runs
from fedpers.evaluation.wording import ranks_over_tables, shortened
from fedpers.settings.groups import method_names, method_title


def board(folder):
    (group,) = leaderboard(find_runs([folder]))
    return group


def write_table(write, table):
    for strategy, scores in table.items():
        for seed, score in enumerate(scores):
            write(strategy, seed, score)


def verdicts(group):
    return {row.strategy: {c.reference: c.verdict for c in row.comparisons} for row in group.rows}


def test_a_table_by_hand(write, tmp_path):
    table = {
        "fedrep": (0.90, 0.91, 0.92),  # local: 0.10, 0.09, 0.11: p = 0.003317; fedavg: 0.30, 0.30, 0.31
        "fedper": (0.81, 0.81, 0.82),  # local: 0.01, -0.01, 0.01: t = 0.5, p = 0.667
        "local": (0.80, 0.82, 0.81),
        "fedavg": (0.60, 0.61, 0.61),  # local: -0.20, -0.21, -0.20: t = -61, p = 0.000269
    }
    write_table(write, table)
    group = board(tmp_path)
    assert [row.label for row in group.rows] == ["FedRep", "FedPer", "Local", "FedAvg"]
    assert group.references == ("local", "fedavg")
    fedrep, fedper, local, fedavg = group.rows
    assert fedrep.best
    assert [c.reference for c in fedrep.comparisons] == ["local", "fedavg"]
    assert [c.reference for c in local.comparisons] == ["fedavg"]
    against_local = [row.comparisons[0] for row in (fedrep, fedper, fedavg)]
    assert [c.over for c in against_local] == ["seeds"] * 3
    # Holm over three: 3 * 0.000269, 2 * 0.003317, 0.667
    assert [c.p_value for c in against_local] == pytest.approx([0.006634, 0.6667, 0.000806], rel=1e-3)
    assert [c.verdict for c in against_local] == ["better", "undecided", "worse"]
    assert against_local[0].difference == pytest.approx(0.1)
    assert group.sentence == (
        "On digits (dirichlet(alpha=0.1), 20 clients), FedRep beats Local and FedAvg; FedPer beats FedAvg and cannot "
        "be told apart from Local; Local beats FedAvg (3 seeds)."
    )


def test_training_alone_wins(write, tmp_path):
    table = {"local": (0.9, 0.91, 0.92), "fedrep": (0.89, 0.92, 0.91), "ditto": (0.79, 0.81, 0.81)}
    write_table(write, table | {"fedavg": (0.5, 0.52, 0.51)})
    assert board(tmp_path).sentence.endswith(
        "Local is not beaten by any method: FedRep beats FedAvg and cannot be told apart from Local; Ditto beats "
        "FedAvg and is worse than Local; Local beats FedAvg (3 seeds)."
    )


def test_a_reference_that_varies_too_much_to_be_beaten_is_not_praised(write, tmp_path):
    table = {"local": (0.93, 0.94, 0.92), "fedavg": (0.5, 0.9, 0.85), "ditto": (0.95, 0.97, 0.945)}
    write_table(write, table)
    sentence = board(tmp_path).sentence
    assert "Ditto beats Local and cannot be told apart from FedAvg" in sentence
    assert "not beaten" not in sentence


def test_two_baselines_alone(write, tmp_path):
    write_table(write, {"local": (0.5, 0.52, 0.51), "fedavg": (0.9, 0.91, 0.93)})
    assert board(tmp_path).sentence.endswith("20 clients), FedAvg beats Local (3 seeds).")


def test_many_methods_are_named_in_part(write, tmp_path):
    names = ["fedrep", "fedper", "gpfl", "ditto", "fedala", "fedamp", "fedbn", "moon", "apfl"]
    write_table(write, {name: (0.9 - i / 100, 0.91 - i / 100, 0.93 - i / 100) for i, name in enumerate(names)})
    write_table(write, {"local": (0.5, 0.52, 0.51), "fedavg": (0.5, 0.51, 0.52)})
    said = board(tmp_path).sentence
    assert "FedRep, FedPer, GPFL, Ditto, FedALA and 4 others beat Local and FedAvg (3 seeds)." in said


def test_nobody_is_counted_who_could_be_named():
    assert shortened(list("abcdef")) == list("abcdef")
    assert shortened(list("abcdefg")) == [*"abcde", "2 others"]


def test_every_method_has_a_name_as_papers_write_it():
    titles = [method_title(name) for name in method_names()]
    assert len(set(titles)) == len(titles)
    assert all(title and len(title) <= 30 and not title.endswith(".") for title in titles)
    assert [method_title(name) for name in ("fedrep", "pfedme", "lg_fedavg", "mine:Anchored", "<b>")] == [
        "FedRep", "pFedMe", "LG-FedAvg", "Anchored", "<b>",
    ]  # fmt: skip


def clients(mean, count=20, step=0.002):
    """Scores around a mean."""
    return [mean + step * (i - (count - 1) / 2) for i in range(count)]


def test_one_seed_is_tested_over_clients_and_says_so(write, tmp_path):
    write("fedrep", 0, 0.9, clients=clients(0.9))
    write("fedper", 0, 0.7, clients=clients(0.7, step=-0.01))
    write("local", 0, 0.7, clients=clients(0.7))
    group = board(tmp_path)
    assert verdicts(group) == {"fedrep": {"local": "untested"}, "fedper": {"local": "undecided"}, "local": {}}
    write("fedrep", 0, 0.9, clients=clients(0.9, step=0.004))  # newer; differences that are not all the same
    group = board(tmp_path)
    (better,) = group.rows[0].comparisons
    assert (better.verdict, better.over) == ("better", "clients")
    assert better.difference == pytest.approx(0.2)
    assert better.low < 0.2 < better.high
    assert math.isnan(group.rows[0].interval)  # none is made up over seeds
    assert group.sentence.endswith(
        "FedRep beats Local; FedPer cannot be told apart from Local; there is no run of FedAvg to compare with (over "
        "the clients of 1 seed, which says nothing of other seeds)."
    )
    assert any("paired bootstrap over clients" in note for note in group.notes)


def test_clients_that_never_train_are_left_out_as_of_the_mean(write, tmp_path):
    write("fedrep", 0, 0.9, clients=[*clients(0.9, step=0.004), 0.9, 0.9], unseen=(20, 21))
    write("local", 0, 0.7, clients=[*clients(0.7), 0.1, 0.1], unseen=(20, 21))
    (better,) = board(tmp_path).rows[0].comparisons
    assert better.difference == pytest.approx(0.2)


def test_two_seeds_with_the_same_difference_prove_nothing_by_themselves(write, tmp_path):
    for seed in (0, 1):
        write("fedrep", seed, 0.9)
        write("local", seed, 0.8)
    group = board(tmp_path)
    assert verdicts(group)["fedrep"] == {"local": "untested"}
    assert "Not tested: FedRep with Local (" in "".join(group.notes)
    assert sum("clients.parquet is missing: not tested over clients." in note for note in group.notes) == 4


def test_a_baseline_with_fewer_seeds_is_compared_over_those_in_common(write, tmp_path):
    for seed in range(5):
        write("fedrep", seed, 0.8 + seed / 100, clients=clients(0.8 + seed / 100, step=0.004))
    for seed in (3, 4):
        write("local", seed, 0.7, clients=clients(0.7))
    write("fedavg", 9, 0.5)
    for seed in range(1, 5):
        write("ditto", seed, 0.6 + seed**2 / 100)
    group = board(tmp_path)
    (local, fedavg) = group.rows[0].comparisons
    assert (local.over, local.verdict) == ("clients", "better")
    assert local.difference == pytest.approx(0.135)  # of seeds 3 and 4
    assert fedavg.verdict == "untested"
    assert math.isnan(fedavg.difference)
    assert "FedRep beats Local and is not tested against FedAvg" in group.sentence


def test_a_seed_without_a_score_is_not_left_out_of_a_comparison(write, tmp_path):
    for seed in range(4):
        write("fedrep", seed, 0.9 + seed**2 / 1000, **({"selected": {}} if seed == 3 else {}))
        write("local", seed, 0.5)
    assert verdicts(board(tmp_path))["fedrep"] == {"local": "untested"}


def test_damaged_files_of_clients_are_named(write, tmp_path):
    damaged = write("fedrep", 0, 0.9)
    (damaged / "clients.parquet").write_text("nonsense")
    write("fedper", 0, 0.9, clients=clients(0.9, step=0.004))
    write("local", 0, 0.5, clients=clients(0.5))
    foreign = write("ditto", 0, 0.4, clients=clients(0.4))
    table = pyarrow.table({"client": [0], "accuracy": [0.5]})
    parquet.write_table(table, foreign / "clients.parquet")
    group = board(tmp_path)
    assert {name: said.get("local") for name, said in verdicts(group).items()} == {
        "fedper": "better", "fedrep": "untested", "local": None, "ditto": "untested",
    }  # fmt: skip
    notes = "\n".join(group.notes)
    assert f"{damaged / 'clients.parquet'} cannot be used" in notes
    assert (
        f"{foreign / 'clients.parquet'} cannot be used (it has no column unseen and no column test_accuracy_selected)"
        in notes
    )


def test_the_best_of_several_local_rows_is_the_reference(write, tmp_path):
    for seed in range(3):
        write("local", seed, 0.7 + seed / 100)
        write("local", seed, 0.8 + seed / 100, config={"training": {"lr": 0.01}})
        write("fedrep", seed, 0.75 + seed**2 / 100)
    group = board(tmp_path)
    row = next(row for row in group.rows if row.strategy == "fedrep")
    assert row.comparisons[0].difference == pytest.approx(0.75 + 5 / 300 - 0.81)
    assert any(note.startswith("Local has 2 rows") and "lr=0.01" in note for note in group.notes)


def test_a_row_of_one_seed_is_no_reference_where_another_can_be_tested_against(write, tmp_path):
    for seed in range(3):
        write("local", seed, 0.7 + seed / 100)
        write("fedrep", seed, 0.75 + seed**2 / 100)
    write("local", 0, 0.8, config={"training": {"lr": 0.01}})
    group = board(tmp_path)
    (compared,) = next(row for row in group.rows if row.strategy == "fedrep").comparisons
    assert (compared.over, compared.seeds) == ("seeds", 3)
    assert compared.difference == pytest.approx(0.75 + 5 / 300 - 0.71)
    assert any("the best of those that have at least 3 seeds (Local lr=0.1)" in note for note in group.notes)


def test_seeds_of_the_sentence_are_those_in_common(write, tmp_path):
    for seed in range(5):
        write("fedrep", seed, 0.8 + seed / 100)
        write("local", seed + 2, 0.6 + seed**2 / 1000)
    group = board(tmp_path)
    assert group.rows[0].comparisons[0].seeds == 3
    assert group.sentence.endswith("FedRep beats Local; there is no run of FedAvg to compare with (3 seeds).")


def test_without_a_baseline_nothing_is_claimed(write, tmp_path):
    for name, score in (("fedrep", 0.9), ("fedper", 0.8)):
        write(name, 0, score)
    assert board(tmp_path).sentence.endswith(
        "FedRep comes first with 90.0 %; there is no run of Local or FedAvg to compare with."
    )
    assert all(not row.comparisons for row in board(tmp_path).rows)


def test_intervals_without_zero_that_are_not_enough_are_explained(write, tmp_path):
    write_table(write, {"local": (0.5, 0.5, 0.5), "fedrep": (0.55, 0.56, 0.57)})  # p = 0.0095 by itself
    write_table(write, {f"m{i}": (0.5, 0.51 + i / 100, 0.49) for i in range(9)})
    group = board(tmp_path)
    (found,) = next(row for row in group.rows if row.strategy == "fedrep").comparisons
    assert found.low > 0
    assert found.verdict == "undecided"
    assert any(note.startswith("Undecided though the interval by itself is without 0") for note in group.notes)


def test_json_has_comparisons_and_the_sentence(write, tmp_path):
    write_table(write, {"local": (0.5, 0.52, 0.51), "fedavg": (0.9, 0.91, 0.93)})
    first = leaderboard_rows([board(tmp_path)])[0]
    assert first["comparisons"][0]["reference"] == "local"
    assert first["comparisons"][0]["verdict"] == "better"
    assert first["sentence"].startswith("On digits")


def test_methods_are_ranked_over_five_tables_that_share_them(write, tmp_path):
    for alpha in range(5):
        for name, score in (("fedrep", 0.9), ("ditto", 0.8), ("local", 0.7)):
            write(name, 0, score, config={"partition": {"name": "dirichlet", "alpha": alpha + 1}})
    write("gpfl", 0, 0.99, config={"partition": {"name": "dirichlet", "alpha": 1}})
    groups = leaderboard(find_runs([tmp_path]))
    said = ranks_over_tables(groups)
    assert said.startswith(
        "Average ranks over 5 tables: FedRep 1.0, Ditto 2.0 and Local 3.0; ranks less than 1.5 apart"
    )
    assert "GPFL" not in said
    assert ranks_over_tables(groups[:4]) == ""


def test_classes_of_the_same_name_keep_their_modules(write, tmp_path):
    for name in ("mine:Method", "yours:Method", "mine:Other"):
        write(name, 0, 0.5)
    assert {row.label for row in board(tmp_path).rows} == {"mine:Method", "yours:Method", "Other"}
