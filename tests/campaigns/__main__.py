"""`python -m tests.campaigns corruption|hostile|kill|pressure`: seeded, bounded, a table at the end."""

import argparse
import importlib
import logging
import pathlib
import sys
import tempfile

CAMPAIGNS = ("corruption", "hostile", "kill", "pressure")


def main() -> int:
    """Runs one campaign; the exit status is 1 where a promise did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trials", type=int, default=None, help="how many; all that the campaign has if less"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="no trial begins later")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        # Only now, for some start JAX, and the processes of others are forked before it starts.
        campaign = importlib.import_module(f"tests.campaigns.{arguments.campaign}")
        lines, held = campaign.run(
            pathlib.Path(folder), seed=arguments.seed, trials=arguments.trials, seconds=arguments.seconds
        )
    print("\n".join(lines))
    print("held" if held else "DID NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
