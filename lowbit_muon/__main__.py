"""The `lowbit-muon` command, which is `python -m lowbit_muon`, too."""

import sys
from importlib.util import find_spec


def main() -> int:
    """Run the command line, whose tables and progress need rich; returns the exit status."""
    if find_spec("rich") is None:
        install = "pip install 'lowbit-muon[cli]', or pip install rich"
        print(f"lowbit-muon: the command line needs rich: {install}", file=sys.stderr)
        return 2
    from lowbit_muon.tools.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
