"""`minirt bandwidth` without an installed minirt: python tools/bandwidth.py attention --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from minirt.cli import main

if __name__ == "__main__":
    main(["bandwidth", *sys.argv[1:]])
