"""What each command of `spear-fast` does; cli.py reads their arguments."""
