"""`python -m inti_kernels info | check | bench | demo | cost | visualize`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": "what is installed, what can run here and, where something can't, why not",
    "check": "compare every op and FusedInTI, forward and backward, with the reference on this machine",
    "bench": "time every op and the whole module against PyTorch, after verifying each",
    "demo": "run CLIP on a real clip, plain, with InTI and with FusedInTI",
    "cost": "multiply-accumulates and parameters of compressed models, beside the published ones",
    "visualize": "show what a model with InTI keeps of each frame of a clip: picture and animation",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2 for arguments that don't parse)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m inti_kernels", description="Inter-frame token interpolation (InTI) for video transformers."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in arguments[:1]:
            # The others are not imported: `info` must run where what another command needs is missing.
            command = importlib.import_module(f".cli.{name}", __package__)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
