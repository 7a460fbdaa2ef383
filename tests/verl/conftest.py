"""Settings of the tests against the real verl, which has an environment of its own, since it cannot share transformers.

tests/integrations/test_verl.py makes that environment and runs this folder there. Where verl is missing, as in the main
environment, nothing here is collected: what would be skipped is run by that test. verl's wheel brings a package called
`tests`; pytest's import mode "importlib" makes `tests.verl` mean this folder all the same.
"""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob = []
if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # verl reads it when it is first imported: the losses have to be there without this project being imported by hand.
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "spear_fast.integrations.verl"
