"""Shopping in WebShop's protocol (arXiv 2207.01206): search, choose options, buy what the instruction asks for."""

from .tasks import ShoppingParams, ShoppingTasks

__all__ = ["ShoppingParams", "ShoppingTasks"]
