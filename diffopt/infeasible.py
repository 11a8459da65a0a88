"""Problems that no x satisfies: soft constraints, and the closest problem that has a solution.

Both are transformations of a quadratic program into others, which are solved and differentiated as any other; so
every backend, device and derivative that a program has they have too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from diffopt import closest, elastic
from diffopt.cones import kinds
from diffopt.elastic import Elastic
from diffopt.errors import BackendUnsupported, ParameterError, SettingsError
from diffopt.problems.forms import Form, QPForm
from diffopt.problems.structure import Declared
from diffopt.solution import Solution

Policy = Elastic | Literal["closest"] | None
"""What happens to a problem that no x satisfies."""


def checked_policy(policy: Any) -> Policy:
    """Return a policy; ``"elastic"`` stands for ``Elastic()``.

    Raises:
        SettingsError: it is none.
    """
    if policy == "elastic":
        return Elastic()
    if policy is None or policy == "closest" or isinstance(policy, Elastic):
        return policy
    raise SettingsError(
        f"`on_infeasible` = {policy!r} is unknown. Expected None, 'elastic', 'closest', or diffopt.Elastic(...)."
    )


def declared_weights(policy: Policy) -> dict[str, Declared]:
    """Return the declarations of a policy's weights, by name."""
    return policy.declared if isinstance(policy, Elastic) else {}


def take_weights(
    policy: Policy, given: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of a policy's weights, and what else was given.

    Args:
        given: the values given at a call, by name, among them the weights that are declared so.
        own: values of the learned and fixed weights; those of the declarations by default.

    Raises:
        ParameterError: a weight was not given, or was given and is not to be.
    """
    rest, weights = dict(given), {}
    for name, declared in declared_weights(policy).items():
        if declared.kind == "given":
            if name not in rest:
                raise ParameterError(f"The elastic constraints need `{name}`, which was not given. Pass {name}=... .")
            weights[name] = rest.pop(name)
        elif name in rest:
            raise ParameterError(
                f"`{name}` is declared {declared.kind} and cannot be given at a call. "
                f"Declare it diffopt.given() to pass it."
            )
        elif declared.kind != "absent":
            weights[name] = own[name] if own is not None and name in own else declared.value()
    return weights, rest


def solve(
    form: Form,
    policy: Policy,
    weights: Mapping[str, Any],
    inner: Callable[[QPForm], Solution],
    tolerance: float,
    exactly: bool,
) -> Solution:
    """Solve a batch of quadratic programs under a policy.

    Args:
        form: the problem, attached to its parameters.
        policy, weights: see `checked_policy`, `take_weights`.
        inner: solves and attaches a form, and never raises for failed instances.
        tolerance: relative residual of a SOLVED instance.
        exactly: derivatives are those of what is solved, and not of a relaxed problem.

    Raises:
        BackendUnsupported: the problem is not a quadratic program over the nonnegative cone.
    """
    if not isinstance(form, QPForm) or kinds(form.cone) - {"NonnegativeCone"}:
        what = type(form).__name__ if not isinstance(form, QPForm) else ", ".join(sorted(kinds(form.cone)))
        raise BackendUnsupported(
            f"`on_infeasible` takes quadratic and linear programs with inequalities, not {what}. Leave it out, and "
            f"write the soft constraints into the problem."
        )
    if isinstance(policy, Elastic):
        return elastic.solve(form, policy, weights, inner, exactly)
    return closest.solve(form, inner, tolerance)
