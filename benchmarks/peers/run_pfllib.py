"""Rounds of FedAvg in PFLlib, in its environment: ``PYTHON benchmarks/peers/run_pfllib.py --checkout FOLDER``.

Its server and clients do what its own loop does in a round; of its evaluation the scores of test samples, and not the
losses of training samples, which the others do not compute. PFLlib reads a client's samples from a file in each round;
the files are written to a temporary folder, where it then looks for them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from problem import BATCH, CLASSES, LR, Problem, options, problem, report, timed


def write(folder: Path, case: Problem) -> None:
    """Write the clients' samples as PFLlib's generators do."""
    for name, parts in (("train", case.train), ("test", case.test)):
        (folder / name).mkdir(parents=True)
        for k, (x, y) in enumerate(parts):
            data = {"x": x.numpy(), "y": y.numpy()}
            np.savez(folder / name / f"{k}.npz", data=np.array(data, dtype=object))


def main() -> None:
    """Run and print the seconds of each round."""
    parser = options(__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of PFLlib, which holds 'system'")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(chosen.checkout.resolve() / "system"))
    from flcore.servers.serveravg import FedAvg

    case = problem(chosen.problem)
    model = case.network().to(chosen.device)
    settings = Namespace(
        device=chosen.device, dataset="peers", num_classes=CLASSES, model=model, algorithm="FedAvg", goal="peers",
        global_rounds=chosen.rounds, local_epochs=1, batch_size=BATCH, local_learning_rate=LR,
        num_clients=len(case.train),
        join_ratio=case.sampled / len(case.train), random_join_ratio=False, time_select=False, time_threthold=10_000,
        save_folder_name="items", top_cnt=100, auto_break=False, eval_gap=10**9, client_drop_rate=0.0,
        train_slow_rate=0.0, send_slow_rate=0.0, dlg_eval=False, dlg_gap=100, batch_num_per_client=2,
        num_new_clients=0, fine_tuning_epoch_new=0, learning_rate_decay=False, learning_rate_decay_gamma=0.99,
        few_shot=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "dataset" / "peers", case)
        system = Path(folder) / "system"
        system.mkdir()
        os.chdir(system)  # it looks in ../dataset
        with contextlib.redirect_stdout(sys.stderr):
            server = FedAvg(settings, 0)

            def play(number: int) -> None:
                server.selected_clients = server.select_clients()
                server.send_models()
                for client in server.selected_clients:
                    client.train()
                server.receive_models()
                server.aggregate_parameters()
                if case.evaluated:
                    server.send_models()
                    server.test_metrics()

            times = timed(play, case.untimed, chosen.rounds, chosen.device)
    report(times)


if __name__ == "__main__":
    main()
