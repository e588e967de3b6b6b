"""``fedpers export``: the network of a client, or the common one, as a file of its own."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from fedpers.app.result import print_error
from fedpers.errors import FedpersError
from fedpers.run.export import Exported, export_client, export_server


def command(arguments: list[str]) -> int:
    """Write a network."""
    parser = argparse.ArgumentParser(
        prog="fedpers export",
        description="Write parameters and buffers of a client's network, or of the one that all clients are sent, as "
        "safetensors; fedpers.load_client(FOLDER, CLIENT) and fedpers.load_server(FOLDER) give the module itself.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="code of your own, e.g. model.name=mine:Net")
    parser.add_argument("--client", metavar="CLIENT", help="number or name; without it the common network")
    parser.add_argument("--round", choices=("last", "best"), default="last", help="of the last checkpoint, or selected")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default client_N.safetensors or server.safetensors")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        if options.client is None:
            exported = export_server(options.folder, options.round, options.overrides)
        else:
            exported = export_client(options.folder, options.client, options.round, options.overrides)
        whose = "server" if exported.client is None else f"client_{exported.client}"
        file = Path(f"{whose}.safetensors") if options.out is None else options.out
        count = _write(exported, file)
    except Exception as error:  # also of code of the user's
        return print_error(error)
    named = f" ({exported.name})" if exported.name else ""
    owner = "the common network" if exported.client is None else f"client {exported.client}{named}"
    print(f"{exported.method}, {owner} after round {exported.round}: {count} values in {file}")
    return 0


def _write(exported: Exported, file: Path) -> int:
    """Write a network's values; how many they are."""
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    metadata = {"method": exported.method, "round": str(exported.round)}
    if exported.client is not None:
        metadata.update({"client": str(exported.client), "name": exported.name})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(exported.module, str(file), metadata)
    except (OSError, SafetensorError) as error:
        raise FedpersError(f"{file} cannot be written ({error}).") from error
    return sum(value.numel() for value in exported.module.state_dict().values())
