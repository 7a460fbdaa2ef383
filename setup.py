"""Packaging: two import packages, one console command.

`kernels/` holds the package `spear_kernels` and never an `__init__.py` of its own: Hugging Face publishes a package
named `kernels`, which transformers imports whenever something of that name is importable.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "spear_fast/__init__.py").read_text()).group(1)

EXTRAS = {
    "train": ["transformers>=5.10", "tokenizers", "safetensors", "jinja2"],
    "track": ["tensorboard", "matplotlib"],
    "envs": ["reasoning-gym>=0.1.25", "pyarrow"],
    "triton": ["triton>=3.6"],
    "vllm": ["vllm>=0.24"],
    "flash": ["flash-attn"],
    "liger": ["liger-kernel"],
    "gpu": ["nvidia-ml-py"],
    "dev": ["pytest", "pytest-cov", "hypothesis", "ruff", "pyright", "pre-commit", "build"],
}

setup(
    name="spear-fast",
    version=VERSION,
    description="A fast trainer for LLM agents with SPEAR: self-imitation learning and one-pass loss kernels",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["spear_fast*"]) + find_packages("kernels"),
    package_dir={"spear_kernels": "kernels/spear_kernels"},
    package_data={"spear_fast": ["py.typed", "memory/*.json"], "spear_kernels": ["py.typed"]},
    install_requires=["torch>=2.10", "numpy>=1.26", "pyyaml>=6", "pydantic>=2.7", "rich>=13"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["spear-fast = spear_fast.cli:main"]},
)
