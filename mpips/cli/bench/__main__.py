"""The program of the ranks: `python -m mpips.cli.bench round --mb 64`, with the flags of `mpips bench`."""

from __future__ import annotations

import argparse
import json
import sys

from mpips.cli.bench import flags
from mpips.cli.bench.error import BenchError
from mpips.cli.bench.session import bench


def main() -> int:
    """Run one benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mpips.cli.bench", allow_abbrev=False)
    flags.add_kinds(parser)
    options = parser.parse_args(namespace=argparse.Namespace(json=False))
    try:
        return bench(options)
    except BenchError as error:
        print(f"mpips bench: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"exit": error.status, "error": str(error)}))
        return error.status


if __name__ == "__main__":
    sys.exit(main())
