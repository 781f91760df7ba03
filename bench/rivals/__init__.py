"""The methods that are compared, a file for each family. A rival that is not installed refuses with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from simct_kernels.options import LossOptions

from ..cases import Case, Problem


@dataclass(frozen=True)
class Method:
    name: str
    # Everything that a training step would have ready is made here and is not timed; what it returns makes the loss.
    prepare: Callable[[Problem], Callable[[], Tensor]]
    # Why it cannot run a case on a device ("cpu" or "cuda"); None if it can.
    refuses: Callable[[Case, str], str | None] = lambda case, device: None
    options: LossOptions = LossOptions()
    same_loss: bool = True  # whether it computes the case's loss, of which all must agree
    compiles: bool = False  # for the sizes of its first call, which is then no measurement on any device
    scale: Callable[[Case], float] = lambda case: 1.0  # its loss times this is the sum over units


def missing(*packages: str) -> str | None:
    """A reason to refuse, unless the packages (or modules) are installed."""

    def found(name: str) -> bool:
        try:
            return find_spec(name) is not None
        except ModuleNotFoundError:  # of the package around it
            return False

    absent = [package for package in packages if not found(package)]
    return f"{', '.join(absent)} not installed" if absent else None


def only(*forms: str) -> Callable[[Case, str], str | None]:
    return lambda case, device: None if case.form in forms else f"does not compute the {case.form} form"


def methods() -> dict[str, Method]:
    from . import cce, compiled, gold_uld, liger_jsd, logsumexp, loop, materialised, ours, torch_lce, trl_divergence

    families = (ours, materialised, compiled, loop, trl_divergence, liger_jsd, gold_uld, cce, torch_lce, logsumexp)
    return {method.name: method for family in families for method in family.METHODS}
