"""What is compared: four baselines, each plain and with SPEAR on top, and SPEAR without one of its parts."""

from __future__ import annotations

SPEAR = (
    "algo.intrinsic.mode=cosine",
    "algo.loss.kind=clip_cov",
    "algo.replay.enabled=true",
    "algo.replay.recalibrate=p50",
    "algo.replay.mode=separate_step",
)
"""What SPEAR adds to a baseline: intrinsic reward, Clip-Cov, self-imitation with recalibrated advantages."""

BASELINES = {
    "grpo": ("algo.preset=grpo",),
    "drbot": ("algo.preset=drbot",),
    "gigpo": ("algo.preset=gigpo",),
    "drbot-gigpo": ("algo.preset=drbot", "algo.advantage.estimator=gigpo"),
}
TITLES = {"grpo": "GRPO", "drbot": "Dr.BoT", "gigpo": "GiGPO", "drbot-gigpo": "Dr.BoT (GiGPO)"}

ABLATED = "drbot-gigpo"
"""The baseline on which the parts of SPEAR are left out one by one."""
ABLATIONS = {
    "no-sil": ("self-imitation", "algo.replay.enabled=false"),
    "no-intrinsic": ("intrinsic reward", "algo.intrinsic.mode=none"),
    "no-recalibration": ("recalibration", "algo.replay.recalibrate=none"),
    "no-clip-cov": ("Clip-Cov", "algo.loss.kind=ppo"),
}
"""By name: the part that is left out, and the option that does it."""


def overrides(arm: str) -> tuple[str, ...]:
    """Return the options of an arm, e.g. of "grpo", "grpo+spear" or "drbot-gigpo+spear:no-sil".

    Raises SystemExit naming the known arms.
    """
    name, _, ablation = arm.partition(":")
    baseline, _, added = name.partition("+")
    known = baseline in BASELINES and added in ("", "spear") and (not ablation or ablation in ABLATIONS)
    if not known or (ablation and not added):
        raise SystemExit(
            f"--arms {arm}: unknown; a baseline ({', '.join(BASELINES)}), behind it +spear, and behind that one of "
            f"{', '.join(':' + each for each in ABLATIONS)}"
        )
    without = (ABLATIONS[ablation][1],) if ablation else ()
    return (*BASELINES[baseline], *(SPEAR if added else ()), *without)


def pair(baseline: str) -> list[str]:
    """Return a baseline's two arms."""
    return [baseline, f"{baseline}+spear"]


SETS = {
    "full": [arm for baseline in BASELINES for arm in pair(baseline)],
    "pairs": [*pair("grpo"), *pair("gigpo")],
    "ablations": [f"{ABLATED}+spear:{name}" for name in ABLATIONS],
}
"""Names for several arms."""
