"""Compare methods with traces of other codes: ``python -m tests.reference [--root ROOT] [METHOD...]``.

ROOT is laid out as ``tests/reference``; inputs, sizes and hyperparameters are read from each trace alone. The real
server and client halves run in the real in-process runtime, see :mod:`tests.traces`. Differences are relative to the
largest entry of a reference array. Exit status 1 when one is over its tolerance.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from fedpers.process import reproducible_convolutions
from tests.traces import HERE, fedrap, fedselect, gpfl, ifca, knnper, pfedhn, pfedrec, pfllib

SOURCES = (pfllib, fedrap, fedselect, gpfl, pfedrec, ifca, pfedhn, knnper)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 when a difference is over its tolerance or there is nothing to compare."""
    known = list(dict.fromkeys(method for source in SOURCES for method in source.METHODS))
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE, help="folder of traces (default: tests/reference)")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    if unknown := [m for m in options.methods if m not in known]:
        parser.error(f"no traces are known for {', '.join(unknown)}; there are {', '.join(known)}")
    methods = options.methods or known
    reproducible_convolutions(options.device)
    cases = [(source, method, path) for source in SOURCES for method, path in source.cases(options.root, methods)]
    if not cases:
        print(f"no traces under {options.root}", file=sys.stderr)
        return 1
    print(f"{'method':<12}{'case':<32}{'difference':>12}  {'tolerance':>9}  where", flush=True)
    results = []
    for source, method, path in cases:
        result = source.compare(method, path, options.device)
        results.append(result)
        where = max(result.worst, key=lambda kind: result.worst[kind])
        verdict = "" if result.ok else "  OVER"
        numbers = f"{result.difference:12.1e}  {result.tolerance:9.0e}"
        print(f"{result.method:<12}{result.case:<32}{numbers}  {where}{verdict}", flush=True)
    bad = sum(not result.ok for result in results)
    print(f"{len(results)} cases, largest difference {max(r.difference for r in results):.1e}, {bad} over tolerance")
    return 1 if bad else 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # most traces have no samples for testing, which each would say
    sys.exit(main())
