"""Time, memory and error of every layer of spear_kernels, of plain torch and of other projects, on the same inputs.

python bench/kernels.py --suite cpu --out bench/results/cpu/kernels.json --plots bench/results/cpu
"""

import sys
from pathlib import Path

if __name__ == "kernels":
    # Another script of this folder runs, and transformers asks for Hugging Face's package of this name. A module
    # without a file is what it takes for none.
    del __file__
elif __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[1]
    # This folder leaves the path, or transformers would find this very file.
    sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]
    from bench.layers.command import main

    sys.exit(main())
