"""spear-fast: a fast trainer for LLM agents with SPEAR (arXiv 2509.22601)."""

__version__ = "0.1.0"
