"""Environments of other libraries as task sets: gymnasium, TRL, OpenEnv, verifiers."""
